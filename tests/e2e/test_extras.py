"""What methods may be given besides: each goes on exactly where a run was cut off."""

from __future__ import annotations

import shutil

import pytest

from rlhf.recipe.load import plan_from_dict
from rlhf.runtime.run import train_plan
from tests.e2e.running import digest, records
from tests.e2e.test_methods import METHODS, recipe_for

EXTRAS = {name: METHODS[name] for name in ("shared_critic", "curriculum")}


@pytest.fixture
def run(tmp_path):
    """run(name, changes) -> the run directory, in this process."""

    def train(name: str, changes: dict):
        recipe = recipe_for(changes)
        recipe["run"] |= {"output_dir": str(tmp_path), "name": name}
        train_plan(plan_from_dict(recipe))
        return tmp_path / name

    return train


def cut_back(run_dir, step: int) -> None:
    """Leave what a run that died right after the checkpoint of `step` would have left."""
    (run_dir / "finished.json").unlink()
    shutil.rmtree(run_dir / "model")
    (stage,) = (run_dir / "stages").iterdir()
    (stage / "finished.json").unlink()
    checkpoints = sorted((stage / "checkpoints").iterdir())
    (kept,) = [c for c in checkpoints if int(c.name.rpartition("-")[2]) == step]
    for checkpoint in checkpoints:
        if checkpoint != kept:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("name", EXTRAS)
def test_resume_is_exact(run, name):
    """Would catch: state of an extra that is not in the checkpoint, or drawn from a stream."""
    whole = run("whole", EXTRAS[name])
    metrics, model = (whole / "metrics.jsonl").read_text(), digest(whole / "model" / "model.safetensors")
    cut_back(whole, 2)
    assert run("whole", EXTRAS[name]) == whole
    assert (whole / "metrics.jsonl").read_text() == metrics
    assert digest(whole / "model" / "model.safetensors") == model


def test_zero_stage_does_not_change_a_shared_critic(run):
    """Would catch: the value head left out of ZeRO's reduction when a step ends with texts that need no values."""
    shared = METHODS["shared_critic"]
    runs = [run(f"zero{z}", shared | {"trainer": shared["trainer"] | {"zero_stage": z}}) for z in (0, 2, 3)]
    one, *others = [[r for r in records(folder) if r["step"]] for folder in runs]
    for other in others:
        for a, b in zip(one, other, strict=True):
            for metric in ("policy/loss", "value/loss", "value/mean", "ptx/loss", "policy/grad_norm"):
                assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), metric
    assert any(abs(r["value/mean"]) > 1e-4 for r in one)
    assert (runs[0] / "model" / "value_head.safetensors").is_file()
