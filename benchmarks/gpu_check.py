"""The Triton kernels on a GPU: right, the same bits whatever is beside a row, and how fast, in a few minutes.

    bash scripts/gpu_check.sh [--out benchmarks/results] [--quick]

Correctness is against the torch forms in float64 on the same device; bits are compared between batches, chunks, pages
and decoding; times are medians of repetitions with the L2 cache written over between them, and shares are of a copy's
bandwidth and a bf16 product's rate measured beforehand in the same process. The table comes last. Ends with 1 if a check failed.
Needs torch, triton and this source tree. --quick uses small shapes, to see that the script runs (on a CPU with
TRITON_INTERPRET=1 too, without times). Writes a file only with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu import attention, matmul, quantized, rows, sampling
from benchmarks.gpu.measure import DEVICE, Timing, made, time_ms
from rlhf.kernels import gpu, native

OPERATIONS = (rows, attention, matmul, quantized, sampling)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="small shapes, no times")
    args = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if DEVICE == "cpu":
        if not (interpreted and args.quick):
            sys.exit(
                "no CUDA device here; TRITON_INTERPRET=1 with --quick runs the checks in Triton's interpreter"
            )
        native.library = lambda name: None
        gpu.serves = lambda *tensors: all(x.dtype == tensors[0].dtype != torch.float64 for x in tensors)
    begun, failed, found = time.perf_counter(), [], []
    for check in (c for operation in OPERATIONS for c in operation.checks(args.quick)):
        found.append(check)
        if not check.passed:
            failed.append(check)
            print(f"FAILED {check.name}: {check.said}", flush=True)
    print(f"{len(found)} checks, {len(failed)} failed, {time.perf_counter() - begun:.0f} s", flush=True)
    times: list[Timing] = []
    top: dict[str, float] = {}
    if DEVICE == "cuda" and not args.quick:
        top = ceilings()
        times = [t for operation in OPERATIONS for t in operation.timings(top)]
    if args.out is not None and DEVICE == "cuda":
        import triton

        args.out.mkdir(parents=True, exist_ok=True)
        about = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        about |= {"copy_TB_s": top.get("copy", 0) / 1e9, "bf16_TFLOP_s": top.get("matmul", 0) / 1e9}
        report = {
            "benchmark": "gpu_check",
            **about,
            "checks": [asdict(c) for c in found],
            "timings": [asdict(t) for t in times],
        }
        file = args.out / f"gpu-{time.strftime('%Y-%m-%d')}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(times) + "\n")
    if times:
        print(f"copy {top['copy'] / 1e9:.2f} TB/s, bf16 product {top['matmul'] / 1e9:.0f} TFLOP/s")
        print(table(times))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
