"""The model that is kept as the best: by which value, and with which weights."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from rlhf.batching import PreferenceExample, SftExample, make_preference_batch, make_sft_batch
from rlhf.models import load_tokenizer
from rlhf.recipe.load import plan_from_dict
from rlhf.runtime.assemble import Objects, group_specs, make_roles
from rlhf.runtime.groups import launch
from rlhf.trainers.roles import Clock
from tests.e2e.running import TINY
from tests.trainers.fake_roles import fake_stage, stage_around

TASK = {"task": "chain_arithmetic", "task_args": {"count": 20, "terms": 3}}
SFT = {
    "method": "sft",
    "data": TASK | {"response_column": "response"},
    "reward": [{"function": "gsm8k"}],
    "trainer": {"steps": 4, "prompts_per_step": 4, "lr": 1e-2, "zero_stage": 0},
}


def evaluation(metric: str) -> dict:
    return {"keep_best": f"eval/held/{metric}", "sets": {"held": TASK}}


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("pass@1", (0.2, 0.5, 0.4, 0.6), [0, 1, 3]),
        ("reward_mean", (math.nan, 0.5, math.nan, 0.4, 0.6), [1, 4]),
        ("truncated_frac", (0.2, 0.5, math.nan, 0.1), [0, 3]),
        ("loss", (2.0, 3.0, 1.0), [0, 2]),
    ],
)
def test_the_best_value_is_the_highest_or_the_lowest_by_its_name(metric, values, kept, tmp_path, monkeypatch):
    """Would catch: a first value that is NaN and stands for ever, a NaN that is kept, the model that is cut off most often."""
    exported = []
    recipe = SFT | {"data": {"path": "none", "response_column": "a"}, "evaluation": evaluation(metric)}
    stage = fake_stage(recipe, tmp_path, monkeypatch, export=lambda _: exported.append(stage.progress.step))
    for stage.progress.step, value in enumerate(values):
        stage._metrics[f"eval/held/{metric}"] = value
        stage._keep_best()
    assert exported == kept


def recipe_with(changes: dict):
    recipe = copy.deepcopy(
        {name: TINY[name] for name in ("run", "model", "tokenizer", "runtime", "tracking")}
    )
    return plan_from_dict(recipe | changes).stages[0].recipe


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_what_is_evaluated_is_what_is_exported(zero_stage, tmp_path):
    """Would catch: scores of the weights as they are under the name of their moving average, an engine or an actor that
    goes on with the average."""
    changes = {
        "trainer": SFT["trainer"] | {"ema_decay": 0.5, "zero_stage": zero_stage},
        "evaluation": evaluation("pass@1"),
        "placement": {"train": {"roles": ["actor"]}, "sample": {"roles": ["rollout"]}},
    }
    recipe = recipe_with(SFT | changes)
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    with launch(group_specs(recipe, 4, Objects()), recipe.runtime) as groups:
        roles = make_roles(recipe, groups, Clock(), tokenizer, Objects())
        stage = stage_around(recipe, tmp_path, actor=roles["actor"], sampler=roles["sampler"])
        batch = make_sft_batch([SftExample(f"{i}", (3, 4 + i), (5, 6 + i, 7), None) for i in range(4)])
        engine = groups.for_role("actor")._worker.actor

        def trained() -> dict[str, torch.Tensor]:
            return {name: w.clone() for name, w in engine.named_full_weights()}

        def sampled_from() -> dict[str, torch.Tensor]:
            return dict(groups.for_role("rollout")._worker.engine.model.named_parameters())

        for _ in range(3):
            stage.update(batch, "sft")
        before = trained()
        with engine.averaged_weights():
            average = trained()
        with stage.exported_weights():
            stage.publish()
            assert all(torch.equal(sampled_from()[name], w) for name, w in average.items())
            assert all(torch.equal(w, average[name]) for name, w in trained().items())
            groups.for_role("actor").call("export", str(tmp_path / "inside"))
            assert all(torch.equal(w, average[name]) for name, w in trained().items())
        assert all(torch.equal(w, before[name]) for name, w in trained().items())
        assert all(torch.equal(sampled_from()[name], w) for name, w in before.items())
        assert any(not torch.equal(w, average[name]) for name, w in before.items())
        groups.for_role("actor").call("export", str(tmp_path / "outside"))
        files = [tmp_path / place / "model.safetensors" for place in ("inside", "outside")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_best_reward_model_knows_its_scale(tmp_path):
    """Would catch: a best model that `reward_model.normalize` refuses, or whose scale is that of other weights."""
    pairs = [PreferenceExample(f"{i}", (3, 4 + i), (5, 6 + i, 7), (8, 9), None) for i in range(6)]
    trainer = SFT["trainer"] | {"ema_decay": 0.5}
    held = {"keep_best": "eval/held/accuracy", "pairs": {"held": TASK}}
    recipe = recipe_with({"method": "rm", "data": TASK, "trainer": trainer, "evaluation": held})
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    with launch(group_specs(recipe, 4, Objects()), recipe.runtime) as groups:
        roles = make_roles(recipe, groups, Clock(), tokenizer, Objects())
        group = groups.for_role("actor")
        stage = stage_around(
            recipe,
            tmp_path,
            actor=roles["actor"],
            data=pairs,
            eval_pairs={"held": pairs},
            export=lambda folder: group.call("export", str(folder)),
        )
        stage._evaluate({})
        config = json.loads((tmp_path / "model-best" / "config.json").read_text())
        scores = roles["actor"].rewards(make_preference_batch(pairs)).double()
        assert config["reward_mean"] == pytest.approx(scores.mean().item())
        assert config["reward_std"] == pytest.approx(scores.std().item())
