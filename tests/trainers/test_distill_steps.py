"""What a step of distillation learns from: the data's answers with their NLL, its own responses without."""

from __future__ import annotations

import pytest
import torch

from rlhf.batching import SftExample, make_sft_batch
from rlhf.data.rows import Dataset
from rlhf.logprobs import batch_top_logprobs
from rlhf.models import build_tokenizer, load_model
from rlhf.recipe.schema import BuildTokenizerConfig, ModelConfig
from rlhf.trainers.distill import train_distill
from rlhf.trainers.forward import loss_function
from tests.e2e.running import TINY
from tests.trainers.fake_roles import FakeActor, FakeSampler, fake_stage, prompts

RECIPE = {
    "method": "distill",
    "data": {"path": "none", "response_column": "answer"},
    "teacher": {"path": "none"},
    "rollout": {"group_size": 2},
    "trainer": {"steps": 8, "prompts_per_step": 2},
}


class _Teacher(FakeActor):
    def top(self, batch):
        return batch


def stage_of(folder, monkeypatch, **distill):
    answers = Dataset(tuple(SftExample(str(i), (1,), (5, 6)) for i in range(8)), "print", {"bad_rows": 0})
    actor = FakeActor(score=lambda batch: torch.zeros(batch.token_ids.shape))
    roles = {"actor": actor, "teacher": _Teacher(), "sampler": FakeSampler()}
    data = {"data": answers, "prompt_data": prompts(8)}
    return fake_stage({**RECIPE, "distill": distill}, folder, monkeypatch, **roles, **data)


def test_own_responses_are_learned_from_by_another_loss(tmp_path, monkeypatch):
    """Would catch: the student's own samples imitated as if they were data, which makes it surer of whatever it says; the
    data's answers without their NLL."""
    stage = stage_of(tmp_path, monkeypatch, on_policy_frac=0.5, nll_coef=0.5)
    train_distill(stage)
    own = [batch.rollout_logprobs is not None for batch, _ in stage.actor.updates]
    assert [loss for _, loss in stage.actor.updates] == ["distill_own" if o else "distill" for o in own]
    assert 0 < sum(own) < len(own) == 8


def test_responses_to_a_prompt_are_a_group(tmp_path, monkeypatch):
    """Would catch: responses that run their prompt each because nothing says that it is one."""
    stage = stage_of(tmp_path, monkeypatch, divergence="sampled_kl", on_policy_frac=1)
    train_distill(stage)
    assert {loss for _, loss in stage.actor.updates} == {"policy"}
    assert all(batch.group_ids.tolist() == [0, 0, 1, 1] for batch, _ in stage.actor.updates)


@pytest.mark.parametrize("top_k", [3, "all"])
def test_own_responses_have_no_nll(tmp_path, monkeypatch, top_k):
    """Would catch: a gradient of the samples' own log-probs, their NLL among the step's numbers."""
    tokenizer = build_tokenizer(BuildTokenizerConfig())
    config = ModelConfig(**TINY["model"])
    student = load_model(config, tokenizer, seed=0, trainable=True)
    teacher = load_model(config, tokenizer, seed=1, trainable=False)
    batch = make_sft_batch([SftExample("a", (3, 4), (5, 6, 7)), SftExample("b", (3,), (8,))])
    found = {}
    for nll_coef in (0.0, 0.5):
        recipe = stage_of(tmp_path, monkeypatch, on_policy_frac=0.5, nll_coef=nll_coef).recipe
        for name in ("distill", "distill_own"):
            taught, beside = with_teacher(teacher, batch, top_k)
            loss, sums = loss_function(name, recipe, **beside)(student, taught)
            (gradient,) = torch.autograd.grad(loss, student.model.embed_tokens.weight)
            found[name, nll_coef] = loss, gradient
            assert ("distill/nll" in sums) == (name == "distill")
    for part in (0, 1):
        plain = found["distill", 0.0][part]
        assert torch.equal(found["distill_own", 0.5][part], plain)
        assert not torch.allclose(found["distill", 0.5][part], plain)


def with_teacher(teacher, batch, top_k):
    if top_k == "all":
        return batch, {"teacher": teacher}
    ids, logprobs = batch_top_logprobs(teacher, batch, targets=batch.loss_mask, temperature=1.0, top_k=top_k)
    return batch.replace(teacher_ids=ids, teacher_logprobs=logprobs), {}
