"""Distillation from whole distributions: the loss of an update, and a run that asks the teacher beside it."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from rlhf.batching import SftExample, make_sft_batch
from rlhf.models import build_tokenizer, load_model
from rlhf.recipe.load import RecipeError, plan_from_dict
from rlhf.recipe.schema import BuildTokenizerConfig, ModelConfig
from rlhf.runtime.run import train_plan
from rlhf.trainers.forward import loss_function
from tests.e2e.running import TINY, records

ROWS = [SftExample("a", (3, 4), (5, 6, 7)), SftExample("b", (3,), (8,)), SftExample("c", (9, 3), (4, 5))]


def recipe_with(folder, **distill) -> dict:
    recipe = copy.deepcopy(
        {name: TINY[name] for name in ("model", "tokenizer", "runtime", "tracking", "data")}
    )
    steps = {"steps": 3, "prompts_per_step": 8, "lr": 1e-2, "zero_stage": 0, "micro_batch_tokens": 64}
    recipe["run"] = {"name": "line", "output_dir": str(folder)}
    recipe["stages"] = {
        "teacher": {"method": "sft", "trainer": steps},
        "student": {
            "method": "distill",
            "model": {"build": {"config": {"hidden_size": 16, "num_hidden_layers": 1}}},
            "teacher": {"path": "stage:teacher"},
            "distill": distill,
            "trainer": steps,
        },
    }
    return json.loads(json.dumps(recipe))


def student_of(folder, **distill):
    return plan_from_dict(recipe_with(folder, **distill)).stages[1].recipe


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_that_of_whole_distributions(divergence, checkpointing, tmp_path):
    """Would catch: the teacher's likeliest tokens in place of all, logits of another token, a gradient to the teacher, the
    teacher's attention in the student's recomputed forward."""
    tokenizer = build_tokenizer(BuildTokenizerConfig())
    config = ModelConfig(**{**TINY["model"], "gradient_checkpointing": checkpointing})
    student = load_model(config, tokenizer, seed=0, trainable=True)
    teacher = load_model(config, tokenizer, seed=1, trainable=False)
    settings = {"divergence": divergence, "top_k": "all", "temperature": 2.0}
    loss = loss_function("distill", student_of(tmp_path, **settings), teacher=teacher)
    batch = make_sft_batch(ROWS)
    for part in ([0, 2], [1]):  # two micro-batches of one step
        share, _ = loss(student, batch.select(part))
        share.backward()

    expected = torch.zeros(())
    plain = load_model(
        config.model_copy(update={"gradient_checkpointing": False}), tokenizer, seed=0, trainable=True
    )
    for row in ROWS:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        at = slice(len(row.prompt_ids) - 1, -1)
        q = (plain(ids).logits[0, at].double() / 2).log_softmax(-1)
        p = (teacher(ids).logits[0, at].double() / 2).log_softmax(-1)
        p, q = (p, q) if divergence == "forward_kl" else (q, p)
        expected = expected + 4 * (p.exp() * (p - q)).sum() / batch.num_loss_tokens
    expected.backward()
    for (name, a), (_, b) in zip(student.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_of_all_is_a_run_of_as_many_as_there_are(tmp_path):
    """Would catch: a teacher that is not asked in the update, or with other weights."""
    curves = {}
    for name, top_k in (("all", "all"), ("every", 1000)):
        train_plan(plan_from_dict(recipe_with(tmp_path / name, top_k=top_k)))
        rows = records(tmp_path / name / "line")
        curves[name] = [r["distill/divergence"] for r in rows if "distill/divergence" in r]
    assert curves["all"] == pytest.approx(curves["every"], rel=1e-4)


def test_whole_distributions_do_not_leave_their_process(tmp_path):
    """Would catch: a teacher in another group that a run looks for beside the actor."""
    recipe = recipe_with(tmp_path, top_k="all")
    recipe["placement"] = {
        "train": {"roles": ["actor", "rollout", "reference"]},
        "other": {"roles": ["teacher"]},
    }
    with pytest.raises(RecipeError, match="put teacher into actor's group"):
        plan_from_dict(recipe)
