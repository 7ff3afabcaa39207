"""The Triton kernels on a GPU: right, the same bits whatever is beside a row, without races, and how fast, in 8 minutes.

    bash scripts/gpu_check.sh [--out benchmarks/results] [--quick] [--only rows attention ...] [--minutes 8]

Correctness is against the torch forms in float64 on the same device; bits are compared between batches, chunks, pages
and decoding; times are medians of repetitions with the L2 cache written over between them, and shares are of a copy's
bandwidth and a bf16 product's rate measured beforehand. Each family of operations (a file in benchmarks/gpu) has a process
of its own: one that dies fails alone. What the time does not suffice for is named, and so is it where compute-sanitizer,
which finds races, is not there. The table comes last. Ends with 1 if a check failed. Needs torch, triton and this source tree.
--quick uses small shapes and takes no times (on a CPU with TRITON_INTERPRET=1 too). Writes a file only with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention, interpreter, matmul, quantized, rows, sampling
from benchmarks.gpu.measure import DEVICE, Check, Timing, made, time_ms
from rlhf.kernels import gpu, native

OPERATIONS = (rows, attention, matmul, sampling, quantized)
FAMILIES = {module.__name__.rpartition(".")[2]: module for module in OPERATIONS}
_FOR_CHECKS = 0.6  # of a family's time
_FOR_RACES = 60.0  # seconds; the tool slows kernels down a hundred times
_RACES = "races"


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


# -- one family, in a process of its own -----------------------------------------------------------------------------------


def run_family(name: str, quick: bool, top: dict[str, float], seconds: float) -> Iterator[dict[str, Any]]:
    """What the family found, one by one; an exception is a failed check."""
    family, begun = FAMILIES[name], time.perf_counter()
    try:
        for check in family.checks(quick):
            yield {"check": asdict(check)}
            if time.perf_counter() - begun > seconds * (_FOR_CHECKS if top else 1.0):
                yield {"left_out": f"{name}: checks after {check.name}"}
                break
        for timing in family.timings(top) if top else ():
            yield {"timing": asdict(timing)}
            if time.perf_counter() - begun > seconds:
                yield {"left_out": f"{name}: times after {timing.name} {timing.shape}"}
                break
    except Exception:
        yield {"check": asdict(Check(f"{name} runs", False, traceback.format_exc(limit=-3)))}


def use_the_interpreter() -> None:
    native.library = lambda name: None
    gpu.serves = interpreter.serves
    interpreter.mend()


# -- all of them -----------------------------------------------------------------------------------------------------------


def in_own_process(
    name: str, args: argparse.Namespace, top: dict[str, float], seconds: float
) -> Iterator[dict[str, Any]]:
    command = [
        sys.executable,
        __file__,
        "--family",
        name,
        "--top",
        json.dumps(top),
        "--seconds",
        str(seconds),
    ]
    command += ["--quick"] * args.quick
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", flush=True)
    if process.returncode:
        yield {"check": asdict(Check(f"{name} ends", False, f"its process ended with {process.returncode}"))}


def races(name: str) -> Iterator[dict[str, Any]]:
    """The family's quick checks under compute-sanitizer's racecheck."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"left_out": f"{name}: races, there is no compute-sanitizer here"}
        return
    command = [
        tool,
        "--tool",
        "racecheck",
        "--error-exitcode",
        "99",
        sys.executable,
        __file__,
        "--family",
        name,
    ]
    command += ["--quick", "--seconds", str(_FOR_RACES / 2)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FOR_RACES, check=False)
    except subprocess.TimeoutExpired:
        yield {"left_out": f"{name}: races, not done in {_FOR_RACES:.0f} s"}
        return
    said = [line for line in done.stdout.splitlines() if "=========" in line][-3:]
    yield {"check": asdict(Check(f"{name} {_RACES}", done.returncode != 99, " ".join(said)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="small shapes, no times")
    parser.add_argument(
        "--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families to check"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    for name, default in (
        ("--family", None),
        ("--top", "{}"),
        ("--seconds", "1e9"),
    ):  # what main tells its processes
        parser.add_argument(name, default=default, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if DEVICE == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1" or not args.quick:
            sys.exit(
                "no CUDA device here; TRITON_INTERPRET=1 with --quick runs the checks in Triton's interpreter"
            )
        use_the_interpreter()
    if args.family is not None:
        for found in run_family(args.family, args.quick, json.loads(args.top), float(args.seconds)):
            print(json.dumps(found), flush=True)
        return
    sys.exit(run_all(args))


def run_all(args: argparse.Namespace) -> bool:
    """Whether a check failed."""
    end = time.perf_counter() + 60 * args.minutes
    top = ceilings() if DEVICE == "cuda" and not args.quick else {}
    found: list[dict[str, Any]] = []
    for i, name in enumerate(args.only):
        share = (end - time.perf_counter()) / (len(args.only) - i)
        for one in in_own_process(name, args, top, share):
            found.append(one)
            check = one.get("check")
            if check and not check["passed"]:
                print(f"FAILED {check['name']}: {check['said']}", flush=True)
    for name in args.only if DEVICE == "cuda" else ():
        if time.perf_counter() + _FOR_RACES < end:
            found += races(name)
        else:
            found.append({"left_out": f"{name}: races, no time left"})
    checks = [one["check"] for one in found if "check" in one]
    times = [Timing(**one["timing"]) for one in found if "timing" in one]
    left_out = [one["left_out"] for one in found if "left_out" in one]
    failed = [c for c in checks if not c["passed"]]
    if args.out is not None and DEVICE == "cuda":
        write(args.out, top, checks, times, left_out)
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
