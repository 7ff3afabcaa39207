"""A reference whose log-probs are cached: its model is gone while the actor learns, and is not loaded for a resumed run."""

from __future__ import annotations

import weakref

import pytest

from rlhf.models import build_model, build_tokenizer, save_model
from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from rlhf.runtime.run import train_plan
from rlhf.trainers.stage import Preempted, Stage
from rlhf.trainers.worker import Worker
from tests.e2e.running import TINY, digest, merged, of_method, records

HELD_OUT = {"held": {"task": "chain_arithmetic", "task_args": {"split": "eval", "count": 8, "terms": 3}}}
DPO = {
    "method": "dpo",
    "run": {"name": "dpo", "save_every": 1},
    "evaluation": {"every": 2, "sets": {}, "pairs": HELD_OUT},
    "trainer": {"steps": 4, "prompts_per_step": 8, "lr": 1e-2, "micro_batch_tokens": 128},
}
APART = {"train": {"roles": ["actor"]}, "still": {"roles": ["reference"]}}
CASES = {
    "beside the actor": {"trainer": {"zero_stage": 0}},
    "beside the actor, split weights": {"trainer": {"zero_stage": 3}},
    "beside the actor, with adapters": {"trainer": {"zero_stage": 2}, "model": {"lora": {"rank": 4}}},
    "in a group of its own": {"trainer": {"zero_stage": 0}, "placement": APART},
}


@pytest.fixture
def loaded(monkeypatch) -> list[weakref.ref]:
    """The references that workers have loaded."""
    models, load = [], Worker._load_reference

    def counted(worker):
        load(worker)
        models.append(weakref.ref(worker._frozen["reference"]))

    monkeypatch.setattr(Worker, "_load_reference", counted)
    return models


@pytest.fixture
def alive(monkeypatch, loaded) -> list[int]:
    """How many of them there are when the first step of a run, or of what is left of it, begins."""
    counts, steps = [], Stage.steps

    def begun(stage):
        assert stage.reference is None
        counts.append(sum(model() is not None for model in loaded))
        return steps(stage)

    monkeypatch.setattr(Stage, "steps", begun)
    return counts


def recipe_with(changes: dict, tmp_path, name: str) -> dict:
    base = {key: value for key, value in TINY.items() if key != "stages"}
    recipe = of_method(merged(base, DPO), changes)
    if not (folder := tmp_path / "other").exists():
        tokenizer = build_tokenizer(BuildTokenizerConfig())
        model = build_model(BuildModelConfig(**TINY["model"]["build"]), tokenizer, dtype="float32", seed=99)
        save_model(model, tokenizer, folder)
    return merged(recipe, {"reference": {"path": str(folder)}, "run": {"output_dir": str(tmp_path / name)}})


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_gone_and_a_resumed_run_is_equal(name, loaded, alive, tmp_path, monkeypatch):
    """Would catch: a second model in memory for the whole stage; a resumed run that loads it for nothing, or compares with
    something else."""
    train_plan(plan_from_dict(recipe_with(CASES[name], tmp_path, "whole")))
    assert (len(loaded), alive) == (1, [0])
    losses = [r["dpo/loss"] for r in records(tmp_path / "whole" / "dpo") if r["step"]]
    assert abs(losses[0] - 0.6931) > 1e-3  # it is another model than the actor's start

    stopped, track = plan_from_dict(recipe_with(CASES[name], tmp_path, "stopped")), Stage.track

    def stop_after(stage, step, **numbers):
        track(stage, step, **numbers)
        stage.should_stop = lambda: step == 1

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Stage, "track", stop_after)
        train_plan(stopped)
    train_plan(stopped)
    assert (len(loaded), alive) == (2, [0, 0, 0])
    for file in ("metrics.jsonl", "model/model.safetensors"):
        whole, resumed = (tmp_path / run / "dpo" / file for run in ("whole", "stopped"))
        assert digest(whole) == digest(resumed), file
