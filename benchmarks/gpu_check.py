"""The Triton kernels on a GPU: right, the same bits whatever is beside a row, without races, and how fast, in 8 minutes.

    bash scripts/gpu_check.sh [--out benchmarks/results] [--quick] [--only rows attention ...] [--minutes 8] [--plan]

Correctness is against the torch forms in float64 on the same device; bits are compared between batches, chunks, pages
and decoding; times are medians with the L2 cache written over before each call, of CUDA graphs where a call is short
(`benchmarks.gpu.measure.time_ms`), and shares are of a copy's bandwidth and a bf16 product's rate measured beforehand.

Each family of operations is a file in benchmarks/gpu. First every processor compiles kernels, then the checks of all
families run at once, then their times one after another, then compute-sanitizer looks for races in one family after
another, each in a process of its own that is ended at its deadline with all that it began: one that dies fails alone. What the time does not suffice for is named, and so is
compute-sanitizer where it is not there or does not work. The table comes last. Ends with 1 if a check failed. Needs torch, triton and this
source tree; the attention's plans are made with numpy, without which that family is left out and named.
--quick uses small shapes and takes no times (on a CPU with TRITON_INTERPRET=1 too). --plan tells what would be done, on any
machine. Writes a file only with --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch

from benchmarks.gpu.measure import DEVICE, TOLERANCES, Check, Timing, made, time_ms
from rlhf.kernels import gpu, native

FAMILIES = ("rows", "attention", "matmul", "sampling", "quantized")
_WITH_NUMPY = {"attention"}  # what needs it
MINUTES = 8.0
TIMES_S = {"rows": 25.0, "attention": 50.0, "matmul": 40.0, "sampling": 15.0, "quantized": 20.0}
DEADLINES_S = {  # what a step's processes have of the 8 minutes, their start included
    "ceilings": 20.0,
    "compile": 120.0,
    "checks": 120.0,
    **{f"times of {name}": seconds for name, seconds in TIMES_S.items()},
    "races": 60.0,  # the tool slows kernels down a hundred times
}
_TO_FINISH = 0.9  # of its deadline, after which a process begins nothing more
_FOUND_RACES = 99  # compute-sanitizer's exit status
_RACES_ORDER = ("quantized", "sampling", "rows", "matmul", "attention")  # the cheapest first
_LEAST_S = 1.0  # with less a process is not begun

Found = list[dict[str, Any]]


def family(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.gpu.{name}")


def ceilings() -> dict[str, float]:
    """A copy's bandwidth in bytes and a bf16 product's rate in operations, per ms."""
    x = torch.empty(1 << 29, dtype=torch.bfloat16, device=DEVICE)
    y, a = torch.empty_like(x), made(8192, 8192)
    return {
        "copy": 2 * x.nbytes / time_ms(lambda: y.copy_(x)),
        "matmul": 2 * 8192**3 / time_ms(lambda: a @ a),
    }


def table(found: list[Timing]) -> str:
    lines = [
        "| operation | shape | ms | of the ceiling | goal | against | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for t in found:
        goal = "" if t.goal is None else f"{t.goal:.0%}" + ("" if t.share >= t.goal else ", not reached")
        ratio = "" if t.ratio is None else f"{t.ratio:.2f}"
        lines.append(
            f"| {t.name} | {t.shape} | {t.ms:.3f} | {t.share:.0%} | {goal} | {t.against} | {ratio} |"
        )
    return "\n".join(lines)


# -- what a process does -----------------------------------------------------------------------------------------------


def compile_share(names: Sequence[str], share: int, of: int) -> Iterator[dict[str, Any]]:
    """Compiles every `of`-th kernel of the families into Triton's cache, from which the other processes take them."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    JITFunction.run = lambda kernel, *args, grid, warmup, **options: launch(
        kernel, *args, grid=grid, warmup=True, **options
    )
    number = -1
    for name in names:
        for dtype in TOLERANCES:
            for operation, call in family(name).calls(dtype):
                number += 1
                if number % of != share:
                    continue
                try:
                    call()
                except Exception:
                    said = traceback.format_exc(limit=-3)
                    yield {"check": asdict(Check(f"{operation} {dtype} compiles", False, said))}


def check_family(name: str, quick: bool) -> Iterator[dict[str, Any]]:
    for check in family(name).checks(quick):
        yield {"check": asdict(check)}


def time_family(name: str, top: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    for timing in family(name).timings(top):
        yield {"timing": asdict(timing)}


def ceilings_found() -> Iterator[dict[str, Any]]:
    yield {"top": ceilings()}


def until(what: str, found: Iterator[dict[str, Any]], seconds: float) -> Iterator[dict[str, Any]]:
    """What is found in so many seconds, one by one; an exception is a failed check."""
    begun = time.perf_counter()
    try:
        for one in found:
            yield one
            if time.perf_counter() - begun > seconds:
                last = (one.get("check") or one.get("timing") or {"name": ""})["name"]
                yield {"left_out": f"{what}: what comes after {last}"}
                return
    except Exception:
        yield {"check": asdict(Check(f"{what} runs", False, traceback.format_exc(limit=-3)))}


def use_the_interpreter() -> None:
    from benchmarks.gpu import interpreter

    native.library = lambda name: None
    gpu.serves = interpreter.serves
    interpreter.mend()


def do(job: dict[str, Any]) -> None:
    """One process's job, as `main` gave it, a line for each thing that it finds."""
    if DEVICE == "cpu":
        use_the_interpreter()
    what, seconds, name = job["what"], job["seconds"], job.get("family", "")
    jobs: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "ceilings": ceilings_found,
        "compile": lambda: compile_share(job["families"], job["share"], job["of"]),
        "checks": lambda: check_family(name, job["quick"]),
        "times": lambda: time_family(name, job["top"]),
    }
    for one in until(f"{name} {what}".strip(), jobs[what](), seconds * _TO_FINISH):
        print(json.dumps(one), flush=True)


# -- all of them -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A job's process, the first of a group of its own."""

    name: str
    output: IO[str]
    process: subprocess.Popen[str]


def at_once(jobs: Sequence[dict[str, Any]], seconds: float, tool: Sequence[str] = ()) -> Found:
    """What processes find, one for each job, that run side by side and are ended after so many seconds. Under a `tool` what
    it says of them, which is no check of the job's own."""
    running: list[Running] = []
    end = time.perf_counter() + seconds
    found: Found = []
    try:
        for job in jobs:
            running.append(_begin(job | {"seconds": seconds}, tool))
        for one in running:
            found += _under_tool(one, end) if tool else _by_itself(one, end)
    finally:
        for one in running:
            _finish(one, 0.0)
            one.output.close()
    for one in found:
        check = one.get("check")
        if check and not check["passed"]:
            print(f"FAILED {check['name']}: {check['said']}", flush=True)
    return found


def _begin(job: dict[str, Any], tool: Sequence[str]) -> Running:
    output = tempfile.TemporaryFile("w+")
    command = [*tool, sys.executable, __file__, "--job", json.dumps(job)]
    error = subprocess.STDOUT if tool else None  # what is wrong with a tool it says there
    process = subprocess.Popen(command, stdout=output, stderr=error, text=True, start_new_session=True)
    return Running(f"{job.get('family', '')} {job['what']}".strip(), output, process)


def _finish(one: Running, seconds: float) -> int | None:
    """The exit status; None where it did not end in so many seconds, and it and what it began were ended."""
    try:
        return one.process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        return None


def _lines(one: Running) -> tuple[Found, list[str]]:
    """What a process found, and the other lines that it wrote. Of one that was ended the last line may be half a one."""
    one.output.seek(0)
    found, said = [], []
    for line in one.output:
        if line.startswith("{") and line.endswith("}\n"):
            found.append(json.loads(line))
        else:
            said.append(line.rstrip())
    return found, said


def _by_itself(one: Running, end: float) -> Found:
    status = _finish(one, end - time.perf_counter())
    found, said = _lines(one)
    for line in said:
        print(line)
    if status is None:
        found.append({"left_out": f"{one.name}: not done at its deadline"})
    elif status:
        found.append({"check": asdict(Check(f"{one.name} ends", False, f"its process ended with {status}"))})
    return found


def _under_tool(one: Running, end: float) -> Found:
    """A check only where the tool worked: it found races, or none in what ran."""
    status = _finish(one, end - time.perf_counter())
    of_job, said = _lines(one)
    ran = any(line["check"]["passed"] for line in of_job if "check" in line)
    found = [{"left_out": f"races, {line['left_out']}"} for line in of_job if "left_out" in line]
    found += [{"said": f"{one.name}: {line.strip()}"} for line in said if "=========" in line]
    if status == _FOUND_RACES or status == 0 and ran:
        return [
            *found,
            {"check": asdict(Check(f"{one.name}, races", status == 0, "compute-sanitizer found some"))},
        ]
    why = "not done at its deadline"
    if status is not None:
        last = next((line for line in reversed(said) if line.strip()), "it said nothing")
        why = f"compute-sanitizer ended with {status}{'' if ran else ' before a check'}: {last.strip()}"
    return [*found, {"left_out": f"races, {one.name}: {why}"}]


def races(names: Sequence[str], seconds: float) -> Found:
    """The families' quick checks under compute-sanitizer's racecheck, one after another: side by side each would be slower."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"left_out": "races: there is no compute-sanitizer here"}]
    watch = [tool, "--tool", "racecheck", "--error-exitcode", str(_FOUND_RACES)]
    end, found = time.perf_counter() + seconds, []
    for name in sorted(names, key=_RACES_ORDER.index):
        left = end - time.perf_counter()
        if left > _LEAST_S:
            found += at_once([{"what": "checks", "family": name, "quick": True}], left, watch)
        else:
            found.append({"left_out": f"races, {name} checks: no time was left"})
    return found


def plan(names: Sequence[str], minutes: float) -> str:
    """What would be done: a line for each family and each step."""
    from benchmarks.kernel_resources import caught

    lines = ["| family | calls that are compiled first | kernels |", "|---|---|---|"]
    for name in names:
        calls = [call for dtype in TOLERANCES for _, call in family(name).calls(dtype)]
        with caught() as launches:
            for call in calls:
                call()
        lines.append(f"| {name} | {len(calls)} | {len({launch.key for launch in launches})} |")
    scale = minutes / MINUTES
    lines += ["", "| step | deadline, s |", "|---|---|"]
    lines += [f"| {step} | {scale * seconds:.0f} |" for step, seconds in DEADLINES_S.items()]
    return "\n".join([*lines, f"| all | {scale * sum(DEADLINES_S.values()):.0f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="small shapes, no times")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES, help="families to check")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # what main tells its processes
    args = parser.parse_args()
    if args.plan:
        print(plan(args.only, args.minutes))
        return
    if DEVICE == "cpu" and (os.environ.get("TRITON_INTERPRET") != "1" or not args.quick and args.job is None):
        sys.exit(
            "no CUDA device here; TRITON_INTERPRET=1 with --quick runs the checks in Triton's interpreter"
        )
    if args.job is not None:
        do(args.job)
        return
    sys.exit(run_all(args))


def run_all(args: argparse.Namespace) -> bool:
    """Whether a check failed."""
    seconds = {step: deadline * args.minutes / MINUTES for step, deadline in DEADLINES_S.items()}
    found: Found = []
    names = [name for name in args.only if name not in _WITH_NUMPY or importlib.util.find_spec("numpy")]
    for name in set(args.only) - set(names):
        found.append({"left_out": f"{name}: there is no numpy here; pip install numpy"})
    if DEVICE == "cuda":
        workers = os.cpu_count() or 1
        shares = [{"what": "compile", "families": names, "share": i, "of": workers} for i in range(workers)]
        found += at_once(shares, seconds["compile"])
    checks_of = [{"what": "checks", "family": name, "quick": args.quick} for name in names]
    found += at_once(checks_of, seconds["checks"])
    top: dict[str, float] = {}
    if DEVICE == "cuda" and not args.quick:
        found += at_once([{"what": "ceilings"}], seconds["ceilings"])
        top = next((one["top"] for one in found if "top" in one), top)
        for name in names if top else ():
            found += at_once([{"what": "times", "family": name, "top": top}], seconds[f"times of {name}"])
    if DEVICE == "cuda":
        found += races(names, seconds["races"])
    return report(args.out, top, found)


def report(out: Path | None, top: dict[str, float], found: Found) -> bool:
    """Prints what was found, the table last; whether a check failed."""
    checks = [one["check"] for one in found if "check" in one]
    times = [Timing(**one["timing"]) for one in found if "timing" in one]
    left_out = [one["left_out"] for one in found if "left_out" in one]
    failed = [c for c in checks if not c["passed"]]
    if out is not None and DEVICE == "cuda":
        write(out, top, checks, times, left_out)
    for one in found:
        if "said" in one:
            print(one["said"])
    for check in failed:
        print(f"failed: {check['name']}: {check['said'].splitlines()[-1] if check['said'] else ''}")
    for name in left_out:
        print(f"left out: {name}")
    if top:
        print(f"copy {top['copy'] / 1e9:.2f} TB/s, bf16 product {top['matmul'] / 1e9:.0f} TFLOP/s")
    print(f"{len(checks)} checks, {len(failed)} failed")
    if times:
        print(table(times))
    return bool(failed)


def write(
    out: Path, top: dict[str, float], checks: list[dict[str, Any]], times: list[Timing], left_out: list[str]
) -> None:
    import triton

    out.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": "gpu_check",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_TB_s": top.get("copy", 0) / 1e9,
        "bf16_TFLOP_s": top.get("matmul", 0) / 1e9,
        "checks": checks,
        "timings": [asdict(t) for t in times],
        "left_out": left_out,
    }
    file = out / f"gpu-{time.strftime('%Y-%m-%d')}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(times) + "\n")


if __name__ == "__main__":
    main()
