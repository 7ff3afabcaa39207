"""The GPU check without a GPU: that it keeps to its time whatever its processes do, and what it says in the end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import gpu_check
from benchmarks.gpu_check import DEADLINES_S, FAMILIES, TIMES_S, at_once, plan, races, report, until

CHECK = {"name": "a row", "passed": True, "said": ""}
TIMING = {"name": "sum", "shape": "3", "ms": 1.0, "share": 0.5, "goal": 0.9, "against": "torch", "ratio": 2.0}


def test_the_deadlines_are_within_eight_minutes():
    """Would catch: a step added without time for it, and a family that is never timed."""
    assert sum(DEADLINES_S.values()) < 8 * 60
    assert (
        set(TIMES_S) == set(FAMILIES)
        and TIMES_S.items()
        <= {step.removeprefix("times of "): seconds for step, seconds in DEADLINES_S.items()}.items()
    )


def test_the_plan_counts_kernels_and_ends_with_the_whole_time():
    """Would catch: a plan that is not of what is compiled, or that does not follow --minutes."""
    said = plan(["quantized"], 4.0).splitlines()
    family, calls, kernels = said[2].strip("| ").split(" | ")
    assert family == "quantized" and 1 < int(calls) <= int(kernels)
    assert said[-1] == f"| all | {sum(DEADLINES_S.values()) / 2:.0f} |"


def test_it_plans_where_there_is_only_torch_and_triton():
    """Would catch: an import of what a GPU machine need not have, directly or not."""
    block = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'numpy', 'transformers', 'pydantic', 'yaml', 'safetensors', 'ray', 'deepspeed'}:\n"
        "            raise ModuleNotFoundError('no ' + name, name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "from benchmarks import gpu_check\n"
        "for name in set(gpu_check.FAMILIES) - gpu_check._WITH_NUMPY: gpu_check.family(name)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block],
        env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_takes_too_long_or_fails_is_named_and_the_rest_is_kept():
    """Would catch: a check that is lost with the one after it, and a family that ends the whole report."""

    def found(fails):
        yield {"check": CHECK}
        if fails:
            raise ZeroDivisionError("of nothing")
        yield {"check": CHECK | {"name": "not reached"}}

    first, last = until("rows checks", found(False), 0.0)
    assert first == {"check": CHECK} and last == {"left_out": "rows checks: what comes after a row"}
    first, last = until("rows checks", found(True), 9.0)
    assert first == {"check": CHECK} and not last["check"]["passed"] and "of nothing" in last["check"]["said"]


def test_a_process_is_ended_at_its_deadline_and_one_that_dies_fails_alone(monkeypatch, tmp_path):
    """Would catch: a kernel that hangs for ever, what was found before it lost, and a crash that nobody sees."""
    script = tmp_path / "job.py"
    script.write_text(
        "import json, os, sys, time\n"
        "job = json.loads(sys.argv[2])\n"
        "print(json.dumps({'check': {'name': job['family'], 'passed': True, 'said': ''}}), flush=True)\n"
        "if job['family'] == 'hangs': time.sleep(60)\n"
        "if job['family'] == 'dies': os.abort()\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    found = at_once([{"what": "checks", "family": name} for name in ("hangs", "dies", "ends")], 2.0)
    passed = {one["check"]["name"]: one["check"]["passed"] for one in found if "check" in one}
    assert passed == {"hangs": True, "dies": True, "ends": True, "dies checks ends": False}
    assert [one["left_out"] for one in found if "left_out" in one] == [
        "hangs checks: not done at its deadline"
    ]


SANITIZER = """#!{python}
import json, os, subprocess, sys, time
assert sys.argv[1:5] == ["--tool", "racecheck", "--error-exitcode", "99"]
family = json.loads(sys.argv[-1])["family"]
with open({log!r}, "a") as log: log.write(family + "\\n")
if family == "quantized":
    sys.exit("no such library: libcuda.so")
if family == "matmul":  # its own child outlives it, unless both are ended
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open({log!r}, "a") as log: log.write(str(child.pid) + "\\n")
    time.sleep(60)
if family != "rows":
    print(json.dumps({{"check": {{"name": family, "passed": True, "said": ""}}}}))
print("========= RACECHECK SUMMARY")
sys.exit(99 if family == "sampling" else 0)
"""


def goes_on(process):
    """Whether a process still runs after a while; one that only waits to be asked for its status does not."""
    stat = Path(f"/proc/{process}/stat")
    for _ in range(100):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_sanitizer_that_does_not_work_finds_no_kernel_without_races(monkeypatch, tmp_path):
    """Would catch: a check that passes where the tool could not start, ran nothing or was ended, a family whose start waits
    for another's end for ever, and the processes of a tool that is ended."""
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    tool.write_text(SANITIZER.format(python=sys.executable, log=str(log)))
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: str(tool))
    found = races(FAMILIES, 3.0)
    *families, child = log.read_text().split()
    assert families == ["quantized", "sampling", "rows", "matmul"]
    assert [(one["check"]["name"], one["check"]["passed"]) for one in found if "check" in one] == [
        ("sampling checks, races", False)
    ]
    assert [one["left_out"] for one in found if "left_out" in one] == [
        "races, quantized checks: compute-sanitizer ended with 1 before a check: no such library: libcuda.so",
        "races, rows checks: compute-sanitizer ended with 0 before a check: ========= RACECHECK SUMMARY",
        "races, matmul checks: not done at its deadline",
        "races, attention checks: no time was left",
    ]
    assert not goes_on(child)
    passed = races(["attention"], 9.0)
    assert [one["check"]["passed"] for one in passed if "check" in one] == [True]


def test_the_table_comes_last(capsys):
    """Would catch: a table that scrolls away, and a failed check that does not fail the run."""
    failed = report(None, {"copy": 3e9, "matmul": 8e11}, [
        {"timing": TIMING}, {"check": CHECK | {"passed": False, "said": "7 differ"}}, {"left_out": "races"},
    ])  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert failed and said[0] == "failed: a row: 7 differ" and "1 checks, 1 failed" in said
    assert said[-1] == "| sum | 3 | 1.000 | 50% | 90%, not reached | torch | 2.00 |"
