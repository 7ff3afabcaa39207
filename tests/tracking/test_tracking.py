"""The record of a run: exact over resume, whole under faults, free of measured values and secrets."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf.tracking
from rlhf.console import Console
from rlhf.recipe.schema import TrackingConfig
from rlhf.records import Prompt, Rollout
from rlhf.runlog import RecordFile, read_records
from rlhf.tracking import Tracker, is_measured, without_secrets

SFT, LAST = 3, 8  # steps 1..3 are sft, 4..8 grpo


def make_rollout(step, index, *, reward=1.0, text="2+2=4", prompt="2+2="):
    return Rollout(
        sample_id=f"{step}/0/{index}",
        prompt=Prompt("train/0", (5, 6), prompt),
        response_ids=(1, 2, 3),
        response_mask=(True,) * 3,
        rollout_logprobs=(0.0,) * 3,
        policy_versions=(0,) * 3,
        finish_reason="stop",
        response_text=text,
        reward=reward,
        reward_parts={"exact_match": 1.0},
    )


def open_tracker(run_dir, resume_step=None, *, wandb="off", recipe=None, output=None, **config):
    console = Console(file=output or io.StringIO(), interactive=False)
    return Tracker(
        run_dir,
        TrackingConfig(wandb=wandb, **config),
        run_name="test",
        resolved_recipe=recipe or {"model": {"path": "m"}},
        resume_step=resume_step,
        console=console,
        recipe_source="recipes/test.yaml",
    )


def metrics_at(step):
    return {"reward/mean": step / 7, "policy/grad_norm": math.nan if step == 5 else 1 / (step + 1)}


def note_samples(tracker, step, stage, rollouts, masked=None):
    tracker.samples(step, stage, rollouts, masked=masked or [None] * len(rollouts))


def run_steps(tracker, first, last, *, seconds=0.1):
    """The calls that a run of two stages makes; the second is evaluated before its first step and at its end."""
    for step in range(first, last + 1):
        stage = "sft" if step <= SFT else "grpo"
        note_samples(tracker, step, stage, [make_rollout(step, i) for i in range(8)])
        evaluation = {"eval/test/pass@1": 0.9} if step == LAST else {}
        tracker.log(step, stage, {**metrics_at(step), **evaluation}, {"time/step_s": seconds})
        if step == SFT:
            begin_grpo(tracker)


def begin_grpo(tracker):
    """The evaluation before a stage's first step has the step number of the stage before."""
    note_samples(tracker, SFT, "grpo", [make_rollout(SFT, 9)])
    tracker.log(SFT, "grpo", {"eval/test/pass@1": 0.25}, {"time/eval_s": 0.1})


def exact_files(run_dir):
    return {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}


@pytest.fixture
def whole_run(tmp_path):
    tracker = open_tracker(tmp_path / "whole")
    run_steps(tracker, 1, LAST)
    tracker.close("finished")
    return exact_files(tmp_path / "whole")


KILLS = [
    (killed, saved)
    for killed in (1, 2, SFT, 5, 7)
    for saved in (None, 1, SFT, 5, 7)
    if (saved or 0) <= killed
]


@pytest.mark.parametrize(("killed_after", "checkpoint"), KILLS)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, whole_run, killed_after, checkpoint):
    # Catches: later records kept on resume, a line written twice, measured values among the exact ones.
    killed = open_tracker(tmp_path / "run")
    run_steps(killed, 1, killed_after, seconds=9.0)
    killed.sync()
    resumed = open_tracker(tmp_path / "run", checkpoint)
    if checkpoint == SFT:  # the runtime does not know whether the stage's first evaluation was recorded
        begin_grpo(resumed)
    run_steps(resumed, (checkpoint or 0) + 1, LAST)
    resumed.close("finished")
    assert exact_files(tmp_path / "run") == whole_run


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("cut", [1, 20])
def test_a_torn_last_line_is_cut_away(tmp_path, whole_run, name, cut):
    # Catches: appending behind half a line, which destroys the next record too.
    killed = open_tracker(tmp_path / "run")
    run_steps(killed, 1, 6)
    killed.sync()
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-cut])
    resumed = open_tracker(tmp_path / "run", 5)
    run_steps(resumed, 6, LAST)
    resumed.close("finished")
    assert exact_files(tmp_path / "run") == whole_run
    assert len(read_records(tmp_path / "run" / "timings.jsonl")) == LAST + 1


def test_records_missing_before_the_checkpoint_are_said(tmp_path):
    # Catches: a hole in the curve that nobody is told about.
    killed = open_tracker(tmp_path)
    run_steps(killed, 1, 2)
    killed.sync()
    output = io.StringIO()
    open_tracker(tmp_path, 7, output=output)
    assert "metrics.jsonl ends at step 2, the checkpoint is of step 7" in " ".join(output.getvalue().split())


def test_a_repeated_step_that_differs_is_said_and_the_first_stays(tmp_path):
    # Catches: a run that silently stops being a function of its recipe.
    killed = open_tracker(tmp_path)
    run_steps(killed, 1, SFT)
    killed.sync()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    output = io.StringIO()
    resumed = open_tracker(tmp_path, SFT, output=output)
    resumed.log(SFT, "grpo", {"eval/test/pass@1": 0.5}, {})
    assert "differs from its record before the resume in eval/test/pass@1" in " ".join(
        output.getvalue().split()
    )
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["kill9", "raise"])
def test_a_kill_inside_log_is_exact_after_resume(tmp_path, whole_run, kind):
    # Catches: a fault point behind the flush, and a half-flushed step that resume counts as done.
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_tracking as t; from rlhf.faults import at_step\n"
        "tracker = t.open_tracker(__import__('pathlib').Path(sys.argv[1]))\n"
        "for step in range(1, 9):\n    at_step(step); t.run_steps(tracker, step, step)\n"
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "RLHF_FAULTS": f"track@6={kind}"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), str(Path(__file__).parent)],
        env=env,
        capture_output=True,
    )
    assert done.returncode == (-signal.SIGKILL if kind == "kill9" else 1), done.stderr.decode()
    if kind == "kill9":
        assert read_records(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 5
    resumed = open_tracker(tmp_path / "run", 4)
    run_steps(resumed, 5, LAST)
    resumed.close("finished")
    assert exact_files(tmp_path / "run") == whole_run


def test_one_record_holds_a_steps_training_and_evaluation(tmp_path):
    # Catches: evaluations in a record of their own, which doubles the step on every x axis.
    tracker = open_tracker(tmp_path)
    tracker.log(0, "grpo", {"eval/test/pass@1": 0.25}, {})
    tracker.log(1, "grpo", {"reward/mean": 0.5, "eval/test/pass@1": 0.75}, {})
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": 0, "stage": "grpo", "eval/test/pass@1": 0.25},
        {"step": 1, "stage": "grpo", "eval/test/pass@1": 0.75, "reward/mean": 0.5},
    ]


def test_measured_values_never_reach_the_exact_file(tmp_path):
    # Catches: a clock in metrics.jsonl, which makes two equal runs differ.
    tracker = open_tracker(tmp_path)
    measured = [
        "time/step_s",
        "perf/train_tokens_per_s",
        "cache/hit_frac",
        "rollout/forward_passes",
        "rollout/preempted",
    ]
    exact = ["robust/skipped_steps", "rollout/truncated_frac", "reward/timeout_frac"]
    tracker.log(1, "grpo", dict.fromkeys(measured + exact, 1.0), {"other": 2.0})
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert set(record) == {"step", "stage", *exact}
    (record,) = read_records(tmp_path / "timings.jsonl")
    assert set(record) == {"step", "stage", "other", *measured}
    assert all(map(is_measured, measured)) and not any(map(is_measured, exact))


def test_values_are_written_exactly_and_nan_stays_visible(tmp_path):
    # Catches: rounding on the way to disk, NaN as null, and invalid JSON.
    tracker = open_tracker(tmp_path)
    tracker.log(1, "grpo", {"a": 0.1 + 0.2, "b": math.nan, "c": -math.inf, "d": 3, "e": True}, {})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert record == {
        "step": 1, "stage": "grpo", "a": 0.30000000000000004, "b": "NaN", "c": "-Infinity", "d": 3, "e": 1,
    }  # fmt: skip


def test_steps_that_go_back_or_repeat_are_refused(tmp_path):
    # Catches: a caller that logs a step in two pieces, or out of order, and so breaks the cut on resume.
    tracker = open_tracker(tmp_path)
    tracker.log(2, "grpo", {"a": 1.0}, {})
    with pytest.raises(ValueError, match="step 2 of stage 'grpo' is logged twice"):
        tracker.log(2, "grpo", {"b": 1.0}, {})
    with pytest.raises(ValueError, match="step 1 is logged after step 2"):
        tracker.log(1, "grpo", {"a": 1.0}, {})
    for value in ("0.5", None):
        with pytest.raises(TypeError, match="metric a is"):
            tracker.log(3, "grpo", {"a": value}, {})
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1


def test_samples_come_from_different_prompts(tmp_path):
    # Catches: a samples file that shows one group of eight equal questions.
    tracker = open_tracker(tmp_path, samples_per_step=4)
    note_samples(tracker, 1, "grpo", [make_rollout(1, i) for i in range(32)])
    ids = [r["sample_id"] for r in read_records(tmp_path / "samples.jsonl")]
    assert ids == ["1/0/0", "1/0/8", "1/0/16", "1/0/24"]
    note_samples(tracker, 2, "grpo", [make_rollout(2, 0)])
    note_samples(tracker, 3, "grpo", [])
    assert len(read_records(tmp_path / "samples.jsonl")) == 5


def test_masked_responses_are_named_without_a_flood(tmp_path):
    # Catches: a sample that is silently left out of the loss, a line for each of a thousand of them, and a
    # reason that is never said again although it came at every step.
    output = io.StringIO()
    tracker = open_tracker(tmp_path, output=output, samples_per_step=8, report_every=4, console_samples=0)
    for step in range(1, 7):
        why = [
            "no reward: f: ValueError: bad cell 1",
            "no reward: f: ValueError: bad cell 2",
            None,
            "too long",
        ]
        rollouts = [make_rollout(step, i) for i in range(4)]
        note_samples(tracker, step, "grpo", rollouts, why if step != 3 else [None] * 4)
    said = " ".join(output.getvalue().split()).split("warning ")[1:]
    assert [line.split(" responses")[0] for line in said] == [
        "step 1: 2 of 4",
        "step 1: 1 of 4",
        "step 5: 2 of 4",
        "step 5: 1 of 4",
    ]
    assert "1/0/0 first: no reward: f: ValueError: bad cell 1" in said[0] and "too long" in said[1]
    assert "(3 times since step 1)" in said[2]
    masked = [r["masked"] for r in read_records(tmp_path / "samples.jsonl")]
    assert masked[:4] == why and masked[8:12] == [None] * 4
    note_samples(tracker, 7, "grpo", [make_rollout(7, i) for i in range(9)], [c * 3 for c in "abcdefghi"])
    assert "4 more responses left out of the loss for 4 other reasons" in " ".join(output.getvalue().split())
    assert len(json.loads((tmp_path / "run.json").read_text())["warnings"]) == 2 + 6


def test_strange_text_survives_the_samples_file(tmp_path):
    # Catches: line separators that split a record, a lone surrogate that stops the run.
    text = "a\n\u2028\x85\x00\ud800\x1b[31m</script>ü"
    tracker = open_tracker(tmp_path)
    note_samples(tracker, 1, "grpo", [make_rollout(1, 0, text=text, prompt=text)])
    tracker.close("finished")
    (record,) = read_records(tmp_path / "samples.jsonl")
    assert record["response"] == record["prompt"] == text


def test_secrets_reach_no_file(tmp_path, monkeypatch):
    # Catches: a key from the recipe or the environment in run.json, the report or wandb's config.
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    recipe = {
        "data": {"path": "https://x/?k=0123456789abcdef0123"},
        "reward": [{"args": {"api_key": "canary-1"}}],
        "rollout": {"max_response_tokens": 32, "stop": ["</s>"]},
    }
    tracker = open_tracker(tmp_path, recipe=recipe, wandb="offline")
    tracker.log(1, "grpo", {"a": 1.0}, {})
    tracker.close("finished")
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        content = path.read_bytes()
        assert b"0123456789abcdef0123" not in content and b"canary-1" not in content, path
    clean = without_secrets(recipe, {})
    assert clean["rollout"] == recipe["rollout"] and clean["data"] == recipe["data"]


def test_status_sessions_and_stages_are_kept_over_a_resume(tmp_path):
    # Catches: a resumed run that forgets its first session and what it said, or says it twice.
    first = open_tracker(tmp_path)
    first.warn("3 rows left out")
    first.warn("the disk is slow")
    first.add_facts({"parameters": 12, "device": "cpu"})
    first.begin_stage("sft", method="sft", first_step=1, last_step=3)
    run_steps(first, 1, 2)
    first.close("interrupted", "Ctrl-C")
    before = json.loads((tmp_path / "run.json").read_text())
    assert (before["status"], before["reason"]) == ("interrupted", "Ctrl-C")
    second = open_tracker(tmp_path, 2)
    second.warn("3 rows left out")
    second.add_facts({"device": "cuda"})
    second.begin_stage("sft", method="sft", first_step=1, last_step=3)
    run_steps(second, 3, LAST)
    second.close("finished")
    second.close("failed")
    after = json.loads((tmp_path / "run.json").read_text())
    assert (after["status"], after["reason"]) == ("finished", None)
    assert after["wandb_id"] != before["wandb_id"]  # it cannot take back steps that come again
    assert after["warnings"] == ["3 rows left out", "the disk is slow"]
    assert after["facts"] == {"parameters": "12", "device": "cuda"}
    assert [s["resume_step"] for s in after["sessions"]] == [None, 2]
    assert [s["name"] for s in after["stages"]] == ["sft"]


@pytest.mark.parametrize("broken", ["start", "log", "finish"])
def test_a_failing_wandb_never_stops_a_run(tmp_path, monkeypatch, broken, whole_run):
    # Catches: a sink that takes the run down with it, or fails without a word.
    class Sink:
        def __init__(self, *args, **kwargs):
            self.fail_at("start")

        def fail_at(self, moment):
            if moment == broken:
                raise ConnectionError("no route to host")

        def log(self, values):
            self.fail_at("log")

        def finish(self, *, exit_code):
            self.fail_at("finish")

    monkeypatch.setattr(rlhf.tracking, "_Wandb", Sink)
    output = io.StringIO()
    tracker = open_tracker(tmp_path / "run", wandb="online", output=output)
    run_steps(tracker, 1, LAST)
    tracker.close("finished")
    assert exact_files(tmp_path / "run") == whole_run
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["dropped"]["wandb"]["count"] == (LAST + 1 if broken == "log" else 1)
    assert output.getvalue().count("wandb failed") == 1 and run["status"] == "finished"


def test_a_terminal_that_goes_away_does_not_stop_a_run(tmp_path, whole_run):
    # Catches: `rlhf train | head` ending the training.
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "broken pipe")

    tracker = open_tracker(tmp_path / "run", output=Closed())
    run_steps(tracker, 1, LAST)
    tracker.close("finished")
    assert exact_files(tmp_path / "run") == whole_run


def test_a_full_disk_at_the_end_does_not_hide_what_stopped_the_run(tmp_path, monkeypatch):
    # Catches: close() raising inside the caller's except block, so that the first error is lost.
    tracker = open_tracker(tmp_path)
    run_steps(tracker, 1, 2)

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rlhf.tracking, "write_atomically", no_space)
    monkeypatch.setattr(RecordFile, "close", no_space)
    monkeypatch.setattr(RecordFile, "flush", no_space)
    with pytest.raises(OSError, match="No space left"):  # a step that is not on disk did not happen
        run_steps(tracker, 3, 3)
    tracker.close("failed", "first error")


def test_a_damaged_run_json_does_not_stop_a_resume(tmp_path, whole_run):
    killed = open_tracker(tmp_path / "run")
    run_steps(killed, 1, 4)
    killed.sync()
    (tmp_path / "run" / "run.json").write_text("{")
    resumed = open_tracker(tmp_path / "run", 4)
    run_steps(resumed, 5, LAST)
    resumed.close("finished")
    assert exact_files(tmp_path / "run") == whole_run


@pytest.mark.parametrize("resumed", [None, 2, SFT, "anew"])
def test_wandb_offline_holds_the_same_metrics(tmp_path, resumed):
    # Catches: other names in wandb than on disk, dropped NaN, a missing step axis; steps that were logged after the
    # checkpoint of a killed run, once more, or the ones before it missing.
    if resumed is not None:
        killed = open_tracker(tmp_path, wandb="offline")
        run_steps(killed, 1, 5)
        killed.close("failed")  # its file would be there after a kill too
    step = resumed if isinstance(resumed, int) else None
    tracker = open_tracker(tmp_path, step, wandb="offline")
    if step == SFT:
        begin_grpo(tracker)
    run_steps(tracker, (step or 0) + 1, LAST)
    tracker.close("finished")
    assert json.loads((tmp_path / "run.json").read_text())["dropped"] == {}
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = wandb_history(path)
    exact = [{k: v for k, v in r.items() if k != "stage"} for r in read_records(tmp_path / "metrics.jsonl")]
    for row, record in zip(rows, exact, strict=True):
        written = {k: "NaN" if v != v else v for k, v in row.items() if k in record}
        assert written == record
    assert all(row["time/step_s"] == 0.1 for row in rows if "time/step_s" in row)


def wandb_history(path):
    """The rows of a wandb file: a log of 32 KiB blocks of records (crc, length, kind), behind a 7-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, parts, rows = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole record, or the last part of one
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
                }
                rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    return rows


def test_importing_the_tracker_is_light():
    # Catches: wandb or torch at import, which every `rlhf --help` would pay for.
    code = "import rlhf.tracking, sys; print([m for m in ('torch', 'wandb', 'transformers') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_summary_of_many_stages_is_a_table(tmp_path):
    # Catches: one line of a thousand characters for a recipe of twenty variants; a stage without an evaluation that
    # shifts the columns.
    output = io.StringIO()
    tracker = open_tracker(tmp_path, output=output)
    tracker.log(0, "s1", {"eval/sums/pass@1": 0.0, "eval/pairs/accuracy": 0.25}, {})
    for i in range(1, 21):
        pairs = {"eval/pairs/accuracy": 0.5} if i != 7 else {}
        tracker.log(i, f"s{i}", {"eval/sums/pass@1": i / 100, **pairs, "eval/sums/reward_mean": 0.3}, {})
    tracker.close("finished")
    summary = output.getvalue().split("finished\n", 1)[1]
    lines = [line.split() for line in summary.splitlines()]
    assert ["held", "out,", "after", "pairs/accuracy", "sums/pass@1"] in lines or [
        "held", "out,", "after", "sums/pass@1", "pairs/accuracy",
    ] in lines  # fmt: skip
    assert sum(line[:1] == [f"s{i}"] for i in range(1, 21) for line in lines) == 20
    assert ["s7", "7.0", "%"] in lines and "→" not in summary
    assert max(map(len, summary.splitlines())) <= 100


def test_the_summary_of_few_stages_is_a_line(tmp_path):
    output = io.StringIO()
    tracker = open_tracker(tmp_path, output=output)
    for step, stage in enumerate(("a", "a", "b", "c")):
        tracker.log(step, stage, {"eval/sums/pass@1": step / 10}, {})
    tracker.close("finished")
    assert "held out, sums/pass@1  0 % → 10.0 % (a) → 20.0 % (b) → 30.0 % (c)" in output.getvalue()
