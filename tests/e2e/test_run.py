"""The whole run from the command line: what it leaves behind, and that it is a pure function of its recipe."""

from __future__ import annotations

import json
import math

import pytest

from rlhf.recipe.load import plan_from_dict
from rlhf.runtime.earlier import changed_keys
from rlhf.runtime.lock import RunInUseError, run_lock
from rlhf.runtime.run import train_plan
from tests.e2e.running import assert_same_run, digest, records


def test_run_leaves_everything_behind(tiny, train):
    """Would catch: a stage that does not hand its model on, metrics lost between stages, a model that transformers
    cannot read, a report that is not written."""
    done, run_dir = train(tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [(r["stage"], r["step"]) for r in records(run_dir)]
    assert steps == [("warmup", s) for s in range(5)] + [("grpo", s) for s in range(5, 11)]
    first, last = records(run_dir)[0], records(run_dir)[-1]
    assert "eval/sums/pass@1" in first and "eval/sums/pass@1" in last
    for name in (
        "reward/mean",
        "reward/gsm8k/mean",
        "policy/loss",
        "policy/grad_norm",
        "policy/kl_ref",
        "rollout/response_tokens_mean",
    ):
        assert math.isfinite(last[name]), name
    assert last["mismatch/logprob_abs_max"] == 0.0  # the sampler's log-probs are the trainer's, bit for bit
    assert last["weights/version"] == 6
    assert not any(name.startswith(("time/", "perf/")) for name in last)
    timed = records(run_dir, "timings.jsonl")[-1]
    assert "time/rollout_s" in timed and timed["rollout/preempted"] == 0 < timed["rollout/forward_passes"]
    assert timed["cache/hit_frac"] == 0 < timed["cache/used_frac"] <= 1  # its prompts fill no page
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
    assert (
        grpo[0]["policy/kl_ref"] < grpo[-1]["policy/kl_ref"]
    )  # the policy moved, and away from the reference


# One run is killed at each of these, in order: (point, step).
KILLED_AT = {
    "between": (
        *(("train.backward", 2), ("checkpoint.before_rename", 4), ("stage.export", 4), ("rollout.mid", 6)),
        *(
            ("checkpoint.after_rename", 8),
            ("track", 9),
            ("checkpoint.delete_old", 10),
            ("stage.finished", "*"),
        ),
    ),
    "within a step": (
        *(("optimizer.before", 1), ("optimizer.after", 4), ("publish.mid", 5)),
        *(("reward.mid", 7), ("train.backward", 8), ("optimizer.after", 9), ("publish.mid", 10)),
    ),
}


def test_full_disk_then_another_start_is_the_uninterrupted_run(tiny, train, whole):
    """Would catch: a full disk that damages the checkpoint before it, leaves half of one, or hides what is missing; the
    error of a run that has gone on to its end since."""
    done, run_dir = train(tiny, name="full", faults="checkpoint.write@8=enospc")
    shown = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1 and "no space for a checkpoint" in shown and "GB are free" in shown, shown
    saved = sorted(p.name for p in (run_dir / "stages" / "grpo" / "checkpoints").iterdir())
    assert saved == ["step-00000002"]  # the stage's own count
    assert "no space" in (run_dir / "error.log").read_text()
    done, run_dir = train(tiny, name="full")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (run_dir / "error.log").exists()
    assert_same_run(whole, run_dir)


def test_changed_data_model_or_reward_is_refused_when_a_run_goes_on(tiny, train, tmp_path):
    """Would catch: a curve of two evaluation sets or of two rewards, or an optimiser that goes on with another model's
    weights."""
    reward = tmp_path / "reward_of_the_user.py"
    reward.write_text("def length(prompts, responses): return [len(r) / 10 for r in responses]\n")
    tiny["reward"] = [{"function": f"{reward}:length"}]
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows)))
    tiny["evaluation"]["sets"] = {"sums": {"path": str(held_out)}}
    done, run_dir = train(tiny, faults="track@8=kill9")
    assert done.returncode == -9, done.stdout + done.stderr
    held_out.write_text("\n".join(map(json.dumps, rows[::-1])))
    reward.write_text(reward.read_text().replace("/ 10", "* 10"))
    with open(run_dir / "stages" / "warmup" / "model" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    done, run_dir = train(tiny)
    shown = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in shown, shown
    for text in (
        "evaluation set 'sums': rows",
        "model: model.safetensors",
        "length': source",
        "another run.name",
    ):
        assert text in shown, shown


@pytest.mark.parametrize("points", KILLED_AT.values(), ids=KILLED_AT)
def test_killed_again_and_again_is_the_uninterrupted_run(tiny, train, whole, points):
    """Would catch: any state that a checkpoint forgets (moments, position, version, records written twice or lost)."""
    for point, step in points:
        done, killed = train(tiny, name="killed", faults=f"{point}@{step}=kill9")
        assert done.returncode == -9, (point, step, done.returncode, done.stdout + done.stderr)
    done, killed = train(tiny, name="killed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(whole, killed)


def test_steps_without_a_token_to_learn_from_move_nothing(tiny, train):
    """Would catch: zero gradients that Adam's momentum turns into updates; a count that a resume forgets; a stop for
    non-finite steps that were none. One token is too short for any answer, and unfinished answers are masked. And a second
    stage that starts without a value, because the first one evaluated answers of another length."""
    tiny["stages"]["grpo"] |= {"rollout": {"max_response_tokens": 1, "top_k": 1}}
    tiny["stages"]["grpo"]["algorithm"]["mask_truncated"] = True
    done, run_dir = train(tiny, faults="track@8=kill9")
    assert done.returncode == -9, done.stdout + done.stderr
    assert "no token counts in its loss" in " ".join((done.stdout + done.stderr).split())
    done, run_dir = train(tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    start, *grpo = [r for r in records(run_dir) if r["stage"] == "grpo"]
    assert start["step"] == 4 and "eval/sums/pass@1" in start
    assert [r["robust/skipped_steps"] for r in grpo] == [1, 2, 3, 4, 5, 6]
    assert [(r["rollout/masked_frac"], r["weights/version"], r["policy/grad_norm"]) for r in grpo] == [
        (1, 0, 0)
    ] * 6
    masked = {r["masked"] for r in records(run_dir, "samples.jsonl")}
    assert masked == {"the response did not end by itself (finish_reason='length')"}
    weights = [digest(run_dir / name / "model.safetensors") for name in ("model", "stages/warmup/model")]
    assert weights[0] == weights[1]


def test_sigterm_saves_and_says_preempted(tiny, train, whole):
    """Would catch: a preempted job that loses its steps since the last checkpoint, or that looks finished."""
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
        with pytest.raises(RunInUseError, match="in use by another run"):
            train_plan(plan, fresh=True)
    assert (tmp_path / "runs" / "tiny").is_dir()
    assert not (tmp_path / "runs" / "tiny.old-1").exists()


def test_what_may_change_on_resume():
    """Would catch: a refused change of the cut of a batch, or an accepted one that changes the numbers."""
    before = "runtime: {deterministic: true, threads: 1}\ntrainer: {micro_batch_tokens: 8}\nstages: {a: {rollout: {page_tokens: 16}}}"
    assert (
        changed_keys(before, before.replace("page_tokens: 16", "page_tokens: 16, prefill_processes: 1")) == []
    )
    allowed = before.replace("micro_batch_tokens: 8", "micro_batch_tokens: 4").replace(
        "page_tokens: 16", "page_tokens: 64"
    )
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
def test_ray_run_is_bitwise_the_local_run(tiny, train, whole):
    """Would catch: numbers that depend on where a role lives: weights that arrive changed, or at one of two engines only,
    another thread count, another order of results; keys of a prompt from a process that has earlier weights."""
    spread = tiny | {
        "placement": {
            "train": {"roles": ["actor", "reference"]},
            "sample": {"roles": ["rollout"], "processes": 2},
        },
        "rollout": tiny["rollout"] | {"prefill_processes": 1},
        "runtime": {"backend": "ray", "threads": 1},
    }
    done, ray = train(spread, name="spread")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(whole, ray)
    steps = [r for r in records(ray, "timings.jsonl") if "rollout/handed_tokens" in r]
    assert steps and all(r["rollout/handed_tokens"] > 0 for r in steps)


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
        spread,
        "rollout.group_size=3",
        "stages.grpo.model.lora.rank=4",
        *(f"stages.grpo.trainer.{o}" for o in odd),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    grpo = [r for r in records(run_dir) if r["stage"] == "grpo"]
    assert [r["mismatch/logprob_abs_max"] for r in grpo] == [0.0] * 6
    assert grpo[0]["policy/kl_ref"] < grpo[-1]["policy/kl_ref"]


@pytest.mark.ray
def test_two_trainer_processes_give_the_same_curve(tiny, train, whole):
    """Would catch: a denominator or an average that depends on the number of processes."""
    two = tiny | {
        "placement": {
            "train": {"roles": ["actor"], "processes": 2},
            "rest": {"roles": ["reference", "rollout"]},
        },
        "runtime": {"backend": "ray", "threads": 1},
    }
    done, ray = train(two, name="two")
    assert done.returncode == 0, done.stdout + done.stderr
    for a, b in zip(records(whole), records(ray), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"stage"}:
            # a gradient's norm: terms that nearly cancel, after steps of Adam that blow roundings up (8e-8 at step 1)
            near = 1e-4 if name.endswith("grad_norm") else 1e-5
            assert a[name] == pytest.approx(b[name], rel=near, abs=1e-5), (a["step"], name)
