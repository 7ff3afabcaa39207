"""The whole run from the command line: what it leaves behind, and that it is a pure function of its recipe."""

from __future__ import annotations

import math

import pytest

from rlhf.checkpoint import CheckpointError, run_lock
from rlhf.recipe.load import plan_from_dict
from rlhf.runtime.run import changed_keys, train_plan
from tests.e2e.running import assert_same_run, records


def test_run_leaves_everything_behind(tiny, train):
    """Would catch: a stage that does not hand its model on, metrics lost between stages, a model that transformers
    cannot read, a report that is not written."""
    done, run_dir = train(tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [(r["stage"], r["step"]) for r in records(run_dir)]
    assert steps == [("warmup", s) for s in range(5)] + [("grpo", s) for s in range(5, 11)]
    first, last = records(run_dir)[0], records(run_dir)[-1]
    assert "eval/sums/pass@1" in first and "eval/sums/pass@1" in last
    for name in ("reward/mean", "reward/gsm8k/mean", "policy/loss", "policy/grad_norm", "policy/kl_ref", "rollout/response_tokens_mean"):
        assert math.isfinite(last[name]), name
    assert last["mismatch/logprob_abs_max"] == 0.0  # the sampler's log-probs are the trainer's, bit for bit
    assert last["weights/version"] == 6
    assert not any(name.startswith(("time/", "perf/")) for name in last)
    assert "time/rollout_s" in records(run_dir, "timings.jsonl")[-1]
    assert len(records(run_dir, "samples.jsonl")) == 6 * 4
    assert "<svg" in (run_dir / "report.html").read_text()
    assert (run_dir / "recipe.yaml").is_file()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    ids = tokenizer("1+2+3=", return_tensors="pt", add_special_tokens=False).input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3

    again, _ = train(tiny)
    assert again.returncode == 0 and "already finished" in again.stdout + again.stderr


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.grpo.model.lora.rank=4"],
        ["stages.grpo.trainer.zero_stage=3"],
        ["model.dtype=bfloat16", "stages.grpo.model.gradient_checkpointing=true"],
        ["stages.grpo.trainer.minibatches_per_step=2", "stages.grpo.trainer.passes_per_step=2"],
    ],
    ids=lambda overrides: overrides[-1].rpartition(".")[2],
)
def test_sampler_and_trainer_agree_in_every_form(tiny, train, overrides):
    """Would catch: an engine that misses the adapters, holds stale weights under ZeRO-3, or another rounding."""
    done, run_dir = train(tiny, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    grpo = [r for r in records(run_dir) if r["stage"] == "grpo"]
    assert [r["mismatch/logprob_abs_max"] for r in grpo] == [0.0] * 6
    assert grpo[0]["policy/kl_ref"] < grpo[-1]["policy/kl_ref"]  # the policy moved, and away from the reference


def test_killed_eight_times_is_the_uninterrupted_run(tiny, train):
    """Would catch: any state that a checkpoint forgets (moments, position, version, records written twice or lost)."""
    done, whole = train(tiny, name="whole")
    assert done.returncode == 0, done.stdout + done.stderr
    points = (
        "train.backward@2=kill9",
        "checkpoint.before_rename@4=kill9",
        "stage.export@4=kill9",
        "rollout.mid@6=kill9",
        "checkpoint.after_rename@8=kill9",
        "track@9=kill9",
        "checkpoint.delete_old@10=kill9",
        "stage.finished=kill9",
    )
    for point in points:
        done, killed = train(tiny, name="killed", faults=point)
        assert done.returncode == -9, (point, done.returncode, done.stdout + done.stderr)
    done, killed = train(tiny, name="killed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(whole, killed)


def test_sigterm_saves_and_says_preempted(tiny, train):
    """Would catch: a preempted job that loses its steps since the last checkpoint, or that looks finished."""
    done, whole = train(tiny, name="whole")
    done, run_dir = train(tiny, name="stopped", faults="train.forward@7=term")
    assert done.returncode == 143, done.stdout + done.stderr
    assert records(run_dir)[-1]["step"] == 7
    done, run_dir = train(tiny, name="stopped")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(whole, run_dir)


def test_fresh_does_not_take_the_folder_of_a_live_run(tiny, tmp_path, monkeypatch):
    """Would catch: two runs writing into one folder after the second moved the first one's away."""
    monkeypatch.chdir(tmp_path)
    plan = plan_from_dict(tiny)
    with run_lock(tmp_path / "runs" / "tiny"):
        with pytest.raises(CheckpointError, match="in use by another run"):
            train_plan(plan, fresh=True)
    assert (tmp_path / "runs" / "tiny").is_dir()
    assert not (tmp_path / "runs" / "tiny.old-1").exists()


def test_what_may_change_on_resume():
    """Would catch: a refused change of the cut of a batch, or an accepted one that changes the numbers."""
    before = "runtime: {deterministic: true, threads: 1}\ntrainer: {micro_batch_tokens: 8}\nstages: {a: {rollout: {page_tokens: 16}}}"
    allowed = before.replace("micro_batch_tokens: 8", "micro_batch_tokens: 4").replace("page_tokens: 16", "page_tokens: 64")
    assert changed_keys(before, allowed) == []
    assert changed_keys(before, before.replace("true", "false").replace("threads: 1", "threads: 2")) == [
        "runtime.deterministic: True -> False",
        "runtime.threads: 1 -> 2",
    ]


def test_another_recipe_in_the_same_directory_is_refused(tiny, train):
    """Would catch: a resumed run that silently mixes two recipes, or a typo's fix that needs another run name."""
    done, _ = train(tiny, "rollout.temperature=0.9", faults="track@1=kill9")
    assert done.returncode == -9
    done, _ = train(tiny, faults="track@4=kill9")  # nothing was saved: the corrected recipe starts over
    assert done.returncode == -9
    done, _ = train(tiny, "rollout.temperature=0.7")
    assert done.returncode == 1
    assert "rollout.temperature" in done.stdout + done.stderr and "--fresh" in done.stdout + done.stderr


@pytest.mark.ray
def test_ray_run_is_bitwise_the_local_run(tiny, train):
    """Would catch: numbers that depend on where a role lives: weights that arrive changed, another thread count,
    another order of results."""
    done, local = train(tiny, name="local")
    assert done.returncode == 0, done.stdout + done.stderr
    spread = tiny | {
        "placement": {
            "train": {"roles": ["actor"]},
            "reference": {"roles": ["reference"]},
            "sample": {"roles": ["rollout"]},
        },
        "runtime": {"backend": "ray", "threads": 1},
    }
    done, ray = train(spread, name="spread")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(local, ray)


@pytest.mark.ray
def test_sharded_lora_actor_reaches_engines_of_their_own(tiny, train):
    """Would catch: adapters or ZeRO-3 shards that are lost on the way to another process; a process without rows that
    leaves the other one waiting (nine rows, one in a micro-batch, on two processes)."""
    spread = tiny | {
        "placement": {
            "train": {"roles": ["actor"], "processes": 2},
            "rest": {"roles": ["reference", "rollout"], "processes": 1},
        },
        "runtime": {"backend": "ray", "threads": 1, "weight_transport": "collective"},
    }
    odd = ["prompts_per_step=3", "minibatches_per_step=3", "micro_batch_tokens=20", "zero_stage=3"]
    done, run_dir = train(
        spread, "rollout.group_size=3", "stages.grpo.model.lora.rank=4", *(f"stages.grpo.trainer.{o}" for o in odd)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    grpo = [r for r in records(run_dir) if r["stage"] == "grpo"]
    assert [r["mismatch/logprob_abs_max"] for r in grpo] == [0.0] * 6
    assert grpo[0]["policy/kl_ref"] < grpo[-1]["policy/kl_ref"]


@pytest.mark.ray
def test_two_trainer_processes_give_the_same_curve(tiny, train):
    """Would catch: a denominator or an average that depends on the number of processes."""
    done, local = train(tiny, name="local")
    two = tiny | {
        "placement": {"train": {"roles": ["actor"], "processes": 2}, "rest": {"roles": ["reference", "rollout"]}},
        "runtime": {"backend": "ray", "threads": 1},
    }
    done, ray = train(two, name="two")
    assert done.returncode == 0, done.stdout + done.stderr
    for a, b in zip(records(local), records(ray), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"stage"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (a["step"], name)
