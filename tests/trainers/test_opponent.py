"""SPIN learns from responses of its opponent, the reference of the iteration, and evaluates the policy."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from rlhf.models import build_model, build_tokenizer, save_model
from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from rlhf.runtime.run import train_plan
from rlhf.trainers import evaluate, online_dpo
from rlhf.trainers.stage import Preempted, Stage
from tests.e2e.running import TINY, digest, merged, of_method, records

SPIN = {
    "method": "online_dpo",
    "run": {"name": "spin", "save_every": 1},
    "online": {"pairs": "gold"},
    # few prompts, each of more than a page of the cache: they come again after the reference has moved
    "data": {
        "response_column": "response",
        "prompt_template": "(0123456789+-*=){prompt}",
        "task_args": {"count": 8, "terms": 3},
    },
    "rollout": {"group_size": 2},
    "evaluation": {"every": 1, "sets": {"sums": {"task_args": {"count": 2}}}},
    "trainer": {"steps": 5, "prompts_per_step": 4, "lr": 1e-2, "zero_stage": 0, "micro_batch_tokens": 128},
}
EVERY_2 = {"update_every": 2}
MIXED = {"update_every": 2, "update_mix": 0.3}
LORA = {"model": {"lora": {"rank": 4}}}
APART = {
    "train": {"roles": ["actor"]},
    "sample": {"roles": ["rollout"]},
    "still": {"roles": ["reference"]},
}
# What differs from SPIN, and the actor's version in the reference of each step.
CASES = {
    "it stays": ({}, [0, 0, 0, 0, 0]),
    "it is replaced": ({"reference": EVERY_2}, [0, 0, 2, 2, 4]),
    "it is mixed": ({"reference": MIXED}, [0, 0, 2, 2, 4]),
    "adapters, it stays": (LORA, [0, 0, 0, 0, 0]),
    "adapters, it is replaced": (LORA | {"reference": EVERY_2}, [0, 0, 2, 2, 4]),
    "adapters, split weights": (LORA | {"trainer": {"zero_stage": 3}}, [0, 0, 0, 0, 0]),
    "apart, it is replaced": ({"reference": EVERY_2, "placement": APART}, [0, 0, 2, 2, 4]),
    "apart, adapters, it is mixed": (
        LORA | {"reference": MIXED, "placement": APART},
        [0, 0, 2, 2, 4],
    ),
    "another model": ({"reference": {"path": "other"}}, [0, 0, 0, 0, 0]),
}


def recipe_with(changes: dict, folder) -> dict:
    base = {name: value for name, value in TINY.items() if name != "stages"}
    recipe = of_method(merged(base, SPIN), changes)
    recipe["run"]["output_dir"] = str(folder)
    if recipe.get("reference", {}).get("path"):
        tokenizer = build_tokenizer(BuildTokenizerConfig())
        model = build_model(BuildModelConfig(**TINY["model"]["build"]), tokenizer, dtype="float32", seed=99)
        save_model(model, tokenizer, folder / "other")
        recipe["reference"]["path"] = str(folder / "other")
    return recipe


@dataclass
class Seen:
    """What the steps of a run learned from, and what its evaluations sampled."""

    versions: list[set[int]] = field(default_factory=list)  # of the responses
    # largest difference between what the engine said of the rejected responses and what others say
    from_reference: list[float] = field(default_factory=list)
    from_policy: list[float] = field(default_factory=list)  # as it is before the step
    evaluated: list[tuple[set[int], int]] = field(default_factory=list)  # versions, and the policy's


@pytest.fixture
def seen(monkeypatch) -> Seen:
    found, stages, said = Seen(), [], {}
    make_pairs, learn, steps = online_dpo.gold_pairs, online_dpo.preference_updates, Stage.steps

    def gold_pairs(groups, gold):
        rollouts = evaluate.flatten(groups)
        said.update({f"{r.sample_id}/rejected": torch.tensor(r.rollout_logprobs) for r in rollouts})
        found.versions.append(versions_of(rollouts))
        return make_pairs(groups, gold)

    def preference_updates(stage, batch):
        def difference(scores: torch.Tensor) -> float:
            rows = [(i, said[name]) for i, name in enumerate(batch.sample_ids) if name in said]
            return max(float((scores[i][batch.loss_mask[i]] - own).abs().max()) for i, own in rows)

        if batch.ref_logprobs is not None:
            found.from_reference.append(difference(batch.ref_logprobs))
        found.from_policy.append(difference(stage.actor.score(batch)))
        return learn(stage, batch)

    def evaluated(*args, **options):
        metrics, rollouts = evaluate.evaluate(*args, **options)
        found.evaluated.append((versions_of(rollouts), stages[-1].progress.version))
        return metrics, rollouts

    def begun(stage):
        stages.append(stage)
        return steps(stage)

    monkeypatch.setattr(online_dpo, "gold_pairs", gold_pairs)
    monkeypatch.setattr(online_dpo, "preference_updates", preference_updates)
    monkeypatch.setattr("rlhf.trainers.stage.evaluate", evaluated)
    monkeypatch.setattr(Stage, "steps", begun)
    return found


def versions_of(rollouts) -> set[int]:
    return {version for r in rollouts for version in r.policy_versions}


@pytest.mark.parametrize("name", CASES)
def test_the_responses_are_the_reference_s_to_the_last_bit(name, seen, tmp_path):
    """Would catch: responses of the present policy, of weights that the reference had before it moved, of the actor's
    share of a mixed reference, with the adapters on; an evaluation of the opponent; a staleness of the policy's weights."""
    changes, versions = CASES[name]
    train_plan(plan_from_dict(recipe_with(changes, tmp_path)))
    assert seen.from_reference == [0.0] * 5
    assert seen.versions == [{version} for version in versions]
    lags = [step - version for step, version in enumerate(versions)]
    differs = [
        lag > 0 or name == "another model" or "mixed" in name and step > 0 for step, lag in enumerate(lags)
    ]
    assert [gap > 1e-3 for gap in seen.from_policy] == differs, seen.from_policy
    assert seen.evaluated == [({step}, step) for step in range(6)]
    steps = [r for r in records(tmp_path / "spin") if r["step"]]
    assert [r["staleness/max"] for r in steps] == [r["staleness/mean"] for r in steps] == lags


@pytest.mark.parametrize("name", ["it is mixed", "adapters, it is replaced"])
def test_a_resumed_run_has_the_same_opponent(name, seen, tmp_path, monkeypatch):
    """Would catch: an opponent that starts again from the first weights, or from the policy's; a version that is lost."""
    recipe = recipe_with(CASES[name][0], tmp_path / "whole")
    train_plan(plan_from_dict(recipe))
    recipe["run"]["output_dir"] = str(tmp_path / "stopped")
    refresh = Stage.refresh_reference

    def stop_after(stage, step):
        refresh(stage, step)
        if step == 3:
            stage.should_stop = lambda: True

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Stage, "refresh_reference", stop_after)
        train_plan(plan_from_dict(recipe))
    train_plan(plan_from_dict(recipe))
    assert seen.from_reference == [0.0] * 10 and seen.versions[5:] == seen.versions[:5]
    whole, stopped = tmp_path / "whole" / "spin", tmp_path / "stopped" / "spin"
    for file in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert digest(whole / file) == digest(stopped / file), file


def test_losses_without_a_reference_have_the_policy_as_opponent(seen, tmp_path):
    """Would catch: a recipe that asks for a reference's responses where there is none."""
    train_plan(plan_from_dict(recipe_with({"preference": {"losses": {"simpo": 1.0}}}, tmp_path)))
    assert seen.from_policy == [0.0] * 5 and seen.versions == [{step} for step in range(5)]
