"""Reward functions in a process of their own: whatever they do, the run goes on and names them."""

from __future__ import annotations

import datetime
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.recipe.schema import RewardConfig
from rlhf.reward import RewardError, Scorer
from tests.reward.test_score import _rollouts

REPO = Path(__file__).resolve().parents[2]

FUNCTIONS = '''
import os, subprocess, sys, time

calls = 0

def judge(prompts, responses, **columns):
    """Does what the responses say; otherwise their length."""
    global calls
    calls += 1
    print("a function may print")
    return [act(r) for r in responses]

def act(response):
    if response == "loop":
        while True:
            pass
    if response == "tower":
        return 9**9**9 * 0.0
    if response == "leave":
        os._exit(3)
    if response == "crash":
        os.kill(os.getpid(), 11)
    if response == "exit":
        sys.exit("bye")
    if response == "raise":
        raise ValueError("cannot judge")
    if response == "calls":
        return calls
    if response == "text":
        return "5"
    if response == "child":
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600.25")
        time.sleep(600)
    if response == "daemon":
        subprocess.Popen(["setsid", "sh", "-c", "sleep 600.75 & sleep 600.75"], start_new_session=True)
        print("started a daemon", file=sys.stderr)
    return len(response)

def years(prompts, responses, day):
    import numpy as np
    return np.array([d.year for d in day])
'''


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "functions_of_the_user.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture(scope="module")
def judge(source) -> Scorer:
    return Scorer([RewardConfig(function=f"{source}:judge", timeout_s=20)])


def impatient(source: Path) -> Scorer:
    return Scorer([RewardConfig(function=f"{source}:judge", timeout_s=1.5)])


def commands() -> list[str]:
    """Command lines of all processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        except OSError:  # it ended while we looked
            continue
    return found


def children_of(pid: int) -> list[str]:
    return [c for c in commands() if "child.py" in c and c.endswith(f" {pid}")]


def ends(command: str) -> bool:
    """Whether no process of this command line is left, within some seconds."""
    deadline = time.monotonic() + 10
    while command in commands() and time.monotonic() < deadline:
        time.sleep(0.05)
    return command not in commands()


def test_results_are_those_of_the_function_in_order(judge, source):
    """Would catch: answers of another call, values that change on the way, state lost between two calls."""
    texts = ["x" * n for n in (3, 1, 4, 1, 5)]
    assert [s.reward for s in judge.score(_rollouts(texts))] == [3, 1, 4, 1, 5]
    first, second = (judge.score(_rollouts(["calls"]))[0].reward for _ in range(2))
    assert second == first + 1
    days = [datetime.date(2020 + i, 1, 1) for i in range(3)]  # no JSON
    scorer = Scorer([RewardConfig(function=f"{source}:years", weight=0.5)])
    assert [s.reward for s in scorer.score(_rollouts(["x"] * 3, day=days))] == [1010, 1010.5, 1011]


@pytest.mark.parametrize("trap", ["loop", "tower", "child"])
def test_what_never_returns_is_killed_at_the_deadline(source, trap):
    """Would catch: a run that hangs on one answer, also in C code that never lets go of the interpreter's lock, or that
    stops for it; what the function has started and left behind; a scorer that is of no use afterwards."""
    scorer = impatient(source)
    scorer.score(_rollouts(["x"]))
    start = time.monotonic()
    scored = scorer.score(_rollouts(["x"] * 7 + [trap] + ["xy"] * 7))
    assert [s.reward for s in scored] == [1] * 7 + [None] + [2] * 7
    assert "no result after 0.5 s, its share of timeout_s=1.5" in scored[7].reward_error
    assert time.monotonic() - start < 15 and scorer.stats["reward/timeout_frac"] == 1 / 15
    assert ends("sleep 600.25")
    assert [s.reward for s in scorer.score(_rollouts(["xy"] * 3))] == [2, 2, 2]


@pytest.mark.parametrize(
    ("trap", "says"), [("leave", "ended with exit code 3"), ("crash", "killed by SIGSEGV")]
)
def test_a_death_costs_the_response_that_caused_it(judge, trap, says):
    """Would catch: a run that ends with the function, or a death that is a reward of 0."""
    scored = judge.score(_rollouts(["x"] * 30 + [trap]))
    assert [s.reward for s in scored] == [1] * 30 + [None]
    assert says in scored[30].reward_error and "judge ran" in scored[30].reward_error


def test_as_many_may_hang_as_may_be_missing(source):
    """Would catch: a run of 512 responses that three of them stop; one hanging response that takes the others' time."""
    scorer = Scorer([RewardConfig(function=f"{source}:judge", timeout_s=3)])
    scored = scorer.score(_rollouts(["loop", "leave", "x"] + ["loop"] + ["xy"] * 76))
    assert [s.reward for s in scored] == [None, None, 1, None] + [2] * 76
    assert scorer.stats["reward/timeout_frac"] == 2 / 80 and scorer.stats["reward/error_frac"] == 1 / 80


@pytest.mark.parametrize("trap", ["leave", "loop"])
def test_what_ends_its_process_is_not_tried_without_end(source, trap):
    """Would catch: a new process for each of a thousand responses."""
    scorer, start = Scorer([RewardConfig(function=f"{source}:judge", timeout_s=2)]), time.monotonic()
    with pytest.raises(RewardError, match="60 of 60 .*not tried: 4 others of this step were late"):
        scorer.score(_rollouts([trap] * 60))
    assert time.monotonic() - start < 20


def test_errors_are_named_per_response_and_logged_once(judge, caplog):
    with caplog.at_level(logging.ERROR, logger="rlhf.reward"):
        for _ in range(2):
            scored = judge.score(_rollouts(["x"] * 30 + ["raise"]))
    assert [s.reward for s in scored] == [1] * 30 + [None]
    assert scored[30].reward_error == "judge: ValueError: cannot judge"
    assert caplog.text.count("Traceback") == 1 and "in act" in caplog.text


def test_a_broken_contract_and_an_exit_stop_the_run_by_name(judge):
    with pytest.raises(RewardError, match=r"judge: index 1 is '5' \(str\)"):
        judge.score(_rollouts(["x", "text"]))
    with pytest.raises(RewardError, match="judge: raised SystemExit: bye"):
        judge.score(_rollouts(["exit"]))


def test_rows_that_cannot_be_sent_are_judged_here(source, caplog):
    """Would catch: rows of the Python API that hold any object, with a function that a recipe names."""
    scorer = Scorer([RewardConfig(function=f"{source}:judge")])
    scored = scorer.score(_rollouts(["xy"], odd=[lambda: None]))
    assert scored[0].reward == 2 and "runs in this process" in caplog.text


def test_a_pattern_without_bound_is_killed(source):
    """Would catch: a recipe's regular expression that one answer keeps busy for years."""
    scorer = Scorer([RewardConfig(function="format", args={"pattern": "(a+)+$"}, timeout_s=1.0)])
    with pytest.raises(RewardError, match="format: no result after timeout_s=1"):
        scorer.score(_rollouts(["a" * 40 + "b"]))


def test_a_module_that_ends_its_process_on_import_is_named(tmp_path, monkeypatch):
    """Would catch: a wait of minutes for a process that has died, or an error that does not say why."""
    (tmp_path / "ends.py").write_text(
        "import os, sys\nif 'child.py' in sys.argv[0]: os._exit(7)\ndef f(p, r): return r\n"
    )
    scorer = Scorer([RewardConfig(function=f"{tmp_path}/ends.py:f")])
    with pytest.raises(RewardError, match="ended with exit code 7 while it imported .*ends.py:f"):
        scorer.score(_rollouts(["x"]))


RUN = """
import sys
from rlhf.recipe.schema import RewardConfig
from rlhf.reward import Scorer
from tests.reward.test_score import _rollouts
"""


def test_it_dies_with_a_killed_run(source):
    """Would catch: an endless loop that outlives the run and keeps a core for ever."""
    code = RUN + f"Scorer([RewardConfig(function={f'{source}:judge'!r})]).score(_rollouts(['loop']))"
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=source.parent)
    try:
        deadline = time.monotonic() + 60
        while not children_of(run.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2.0)  # into the loop
        assert children_of(run.pid)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    deadline = time.monotonic() + 10
    while children_of(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children_of(run.pid)


@pytest.mark.parametrize("end", ["", "import os; os.kill(os.getpid(), 9)"], ids=["end", "kill"])
def test_nothing_that_a_function_has_started_outlives_the_run(source, end):
    """Would catch: a daemon in a session of its own that survives the run and keeps `rlhf train ... | cat` from ending;
    one whose parents have ended; a run that was killed."""
    code = (
        RUN + f"Scorer([RewardConfig(function={f'{source}:judge'!r})]).score(_rollouts(['daemon']))\n" + end
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == (-9 if end else 0) and "started a daemon" in done.stderr, done.stderr
    assert ends("sleep 600.75")


def test_a_death_leaves_nothing_behind_and_says_how(source, tmp_path):
    """Would catch: a daemon of a process that has crashed; prints that tear the terminal's display apart."""
    scorer = Scorer([RewardConfig(function=f"{source}:judge")], output=tmp_path / "reward.log")
    scored = scorer.score(_rollouts(["daemon", "xy", "crash"]))
    assert [s.reward for s in scored] == [6, 2, None] and "SIGSEGV" in scored[2].reward_error
    printed = (tmp_path / "reward.log").read_text()
    assert printed.count("a function may print") >= 3 and "started a daemon" in printed
    scorer.score(_rollouts(["crash", "xy"]))
    assert ends("sleep 600.75")


def test_a_function_object_that_holds_the_interpreter_ends_the_run_with_its_stack():
    """Would catch: a notebook's lambda that hangs the run in C code, in which no thread of Python sees a deadline."""
    code = (
        RUN
        + "from rlhf.reward import score\nscore._GRACE_S = 0.5\n"
        + "def power_tower(prompts, responses): return [9**9**9 * 0.0]\n"
        + "Scorer([RewardConfig(function='f', timeout_s=0.5)], {'f': power_tower}).score(_rollouts(['x']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "in power_tower" in done.stderr and "Timeout" in done.stderr
