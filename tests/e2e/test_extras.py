"""What methods may be given besides: each goes on exactly where a run was cut off."""

from __future__ import annotations

import shutil

import pytest

from rlhf.models import build_model, build_tokenizer
from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from rlhf.runtime.run import train_plan
from rlhf.trainers.reference_cache import ReferenceCache
from tests.e2e.running import TINY, digest, records
from tests.e2e.test_methods import METHODS, documented, recipe_for

EXTRAS = {name: METHODS[name] for name in ("shared_critic", "curriculum", "replay")}


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


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    """The folder of a small model with another vocabulary than the policy's."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = build_tokenizer(BuildTokenizerConfig(alphabet="#0123456789+-*=() ,.:?AByn"))
    build = BuildModelConfig(
        **TINY["model"]["build"] | {"config": TINY["model"]["build"]["config"] | {"initializer_range": 0.3}}
    )
    build_model(build, tokenizer, dtype="float32", seed=7).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


JUDGED = {
    "alone": (
        {"method": "grpo"},
        {"template": "{prompt}:{response}?", "verdicts": ["y", "n"], "weight": 0.5},
    ),
    "pairs": (
        {"method": "online_dpo", "reward": [], "evaluation": {"sets": {}}},
        {"template": "{prompt}:{first},{second}?"},
    ),
    "best": (
        {"method": "rejection", "reward": [], "evaluation": {"samples": 2, "temperature": 1.0}},
        {"template": "{prompt}:{first},{second}?"},
    ),
}


@pytest.mark.parametrize("name", JUDGED)
def test_a_judge_rewards_and_a_cut_off_run_goes_on(run, judge, name):
    """Would catch: a judge with the policy's tokenizer, verdicts that reach no reward, numbers that are not documented."""
    method, section = JUDGED[name]
    changes = method | {"judge": section | {"path": judge}}
    whole = run("judged", changes)
    text = (whole / "metrics.jsonl").read_text()
    steps = [r for r in records(whole) if r["step"]]
    assert all(0 < r["reward/judge/mean"] < 1 and r["reward/std"] > 0 for r in steps)
    emitted = {metric for r in steps for metric in r} - {"step", "stage"}
    assert emitted <= documented(emitted) and "judge/verdict_mass" in emitted
    cut_back(whole, 2)
    run("judged", changes)
    assert (whole / "metrics.jsonl").read_text() == text


def test_evaluations_may_judge_by_a_reward_of_their_own(run):
    """Would catch: what a model of the reward says taken for accuracy; an evaluation's reward that is trained on."""
    easy = [{"function": "format", "args": {"pattern": ""}}]  # everything passes
    changes = METHODS["ppo"] | {"reward": easy}
    by_training, by_itself = (
        [r for r in records(run(name, changes | {"evaluation": {"reward": own}})) if "eval/sums/pass@1" in r]
        for name, own in (("training", None), ("itself", [{"function": "gsm8k"}]))
    )
    assert {r["eval/sums/pass@1"] for r in by_training} == {1.0}
    assert all(r["eval/sums/pass@1"] < 0.5 for r in by_itself) and by_itself[-1]["reward/mean"] == 1.0
    assert "reward/gsm8k/mean" not in by_itself[-1]


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


def test_runs_share_what_a_reference_says(run, tmp_path, monkeypatch):
    """Would catch: log-probs computed again by every run of a sweep; another's numbers taken for one's own; a run that
    cannot go on once the shared folder is cleared."""
    alone = run("alone", METHODS["dpo"])
    shared = METHODS["dpo"] | {"reference": {"cache_dir": str(tmp_path / "kept")}}
    run("first", shared | {"trainer": {"lr": 3e-3}})
    (kept,) = (tmp_path / "kept").iterdir()
    monkeypatch.delattr(ReferenceCache, "make")
    second = run("second", shared)
    text = (alone / "metrics.jsonl").read_text()
    assert (second / "metrics.jsonl").read_text() == text
    kept.unlink()
    cut_back(second, 2)
    run("second", shared)
    assert (second / "metrics.jsonl").read_text() == text
    assert kept.is_file()
    with pytest.raises(AttributeError, match="make"):
        run("other", shared | {"data": {"task_args": {"seed": 5}}})
