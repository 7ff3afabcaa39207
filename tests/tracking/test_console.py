"""The terminal: bars or plain lines, and nothing that a model wrote may act on it."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rlhf.console import Console
from rlhf.records import Prompt, Rollout

ROOT = Path(__file__).resolve().parents[2]


def rollout(text, *, reward=1.0):
    prompt = Prompt("train/0", (1,), "[bold]2+2=[/bold]")
    return Rollout("1/0/0", prompt, (1,), (True,), (0.0,), (0,), "length", text, reward=reward)


def plain(**kwargs):
    output = io.StringIO()
    return Console(file=output, interactive=False, **kwargs), output


def test_a_pipe_gets_whole_lines_and_no_control_codes():
    # Catches: escape sequences and half-drawn bars in a log file.
    console, output = plain()
    console.begin_run("name", recipe="recipes/x.yaml", run_dir="runs/name", resume_step=None)
    console.begin_stage("grpo", first_step=4, last_step=13, done_step=0)
    for step in range(4, 14):
        console.step(step, "grpo", {"reward/mean": step / 10, "policy/entropy": 0.5})
    console.end_run("finished", facts=[("report", "runs/name/report.html")])
    lines = output.getvalue().splitlines()
    assert lines[0] == "name  recipe recipes/x.yaml  in runs/name"
    assert lines[1] == "stage grpo: 10 steps"
    assert lines[2].startswith(
        "grpo   1/10  reward 0.4  entropy 0.5"
    )  # the first and the last, not every one
    assert lines[3].startswith("grpo  10/10  reward 1.3") and len(lines) == 6
    assert "\x1b" not in output.getvalue()


def test_a_response_cannot_act_on_the_terminal():
    # Catches: escape codes, markup and surrogates of a response that reach the terminal or stop the run.
    console, output = plain(width=200)
    console.samples(
        1,
        "grpo",
        [
            rollout("\x1b[2J\x9b31m\r[red]x[/red]\ud800\n" + "y" * 500),
            rollout("", reward=None).replace(reward_error="late"),
        ],
    )
    text = output.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert "[red]x[/red]" in text and "[bold]2+2=[/bold]" in text and "missing" in text and "length" in text
    assert 200 <= text.count("y") <= 240 and text.rstrip().count("…") == 1


def test_a_terminal_gets_a_bar_for_each_stage():
    output = io.StringIO()
    console = Console(file=output, interactive=True, width=110)
    console.begin_stage("sft", first_step=1, last_step=2, done_step=0)
    console.step(1, "sft", {"sft/loss": 1.5})
    console.step(2, "sft", {"sft/loss": 1.25, "eval/test/pass@1": 0.5})
    console.begin_stage("grpo", first_step=3, last_step=4, done_step=0)
    console.phase("rollout")
    console.step(3, "grpo", {"reward/mean": 0.75})
    console.end_run("interrupted", facts=[])
    console.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert "2/2" in text and "loss 1.25" in text and "1/2" in text and "reward 0.75" in text
    assert "step 2  held out  test/pass@1 50.0 %" in text and text.rstrip().endswith("interrupted")
    assert output.getvalue().count("\x1b[?25l") == output.getvalue().count(
        "\x1b[?25h"
    )  # the cursor comes back


def test_an_evaluation_without_responses_is_said_too():
    # Catches: a run with held-out rows or pairs whose terminal never says how good it is there.
    console, output = plain()
    console.begin_stage("sft", first_step=1, last_step=2, done_step=0)
    console.step(1, "sft", {"eval/rows/loss": 1.25, "eval/rows/perplexity": 3.5, "eval/pairs/accuracy": 0.5})
    assert "step 1  held out  rows/loss 1.25,  pairs/accuracy 50.0 %" in output.getvalue()
    assert "perplexity" not in output.getvalue()


def test_many_bars_of_a_narrow_terminal_leave_the_moving_one_in_sight():
    # Catches: twenty bars in a terminal of 24 lines, where the last one, which moves, is cut off; metrics that push the
    # bar out of a line of 80 characters.
    output = io.StringIO()
    console = Console(file=output, interactive=True, width=80)
    metrics = {
        "reward/mean": 0.0312,
        "rollout/response_tokens_mean": 110.5,
        "policy/entropy": 0.333,
        "policy/clip_frac": 0.125,
    }
    for i in range(20):
        console.begin_stage(f"variant_{i}", first_step=1 + 200 * i, last_step=200 * i + 200, done_step=0)
        console.phase("starting processes and loading models")
        console.step(200 * i + 100, f"variant_{i}", metrics)
        assert len(console._progress.tasks) <= 8
    console.end_run("finished", facts=[])
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue()).replace("\r", "\n").splitlines()
    bars = [line for line in lines if "100/200" in line and "━" in line]
    assert (
        bars
        and all("━━━━" in line and "reward 0.0312" in line for line in bars)
        and max(map(len, lines)) <= 80
    )
    assert all(any(line.startswith(f"variant_{i} ") for line in lines) for i in range(20))


def test_a_resumed_stage_starts_where_it_was():
    console, output = plain()
    console.begin_stage("grpo", first_step=4, last_step=13, done_step=8)
    console.step(13, "grpo", {})
    assert "stage grpo: 10 steps, 5 done" in output.getvalue() and "10/10" in output.getvalue()


def test_a_closed_pipe_neither_ends_the_process_nor_changes_its_exit_code():
    # Catches: `rlhf train | head -1` dying at the second line.
    code = (
        "from rlhf.console import Console\nc = Console()\n"
        "for i in range(20000): c.say('x' * 50)\nprint('a library', flush=True)\nimport sys; print('alive', file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"alive\n" and process.wait() == 0


def test_an_ascii_terminal_gets_question_marks_instead_of_an_exception():
    code = "from rlhf.console import Console\nc = Console()\nc.say('a → b …')"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"a ? b")
