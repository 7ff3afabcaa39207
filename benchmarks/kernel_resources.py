"""What every Triton kernel takes of a GPU: registers, spills and shared memory, compiled for sm_80 and sm_90 without one.

    python benchmarks/kernel_resources.py [--out benchmarks/results]

The operations' own launches are caught, not repeated here: the modules in `benchmarks/gpu` call them, and what they
would have launched is compiled. Ends with 1 if a kernel spills more or less than `MAY_SPILL` says, or takes more shared
memory than the target has for a program.
Writes a file only with --out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.gpu_check import FAMILIES, family
from benchmarks.running import machine

TARGETS = (80, 90)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448}  # that a program can have
# Bytes of a thread that a kernel of an operation spills, and why; every other may spill none
MAY_SPILL: dict[str, dict[str, int]] = {
    "a row is held whole: x, its gradient and the weight": {
        "rms_norm backward 16384: _backward fp32 sm_80": 64,
        "rms_norm backward 16384: _backward fp32 sm_90": 96,
        "rms_norm backward 16384: _backward bf16 sm_90": 8,
        "rms_norm backward 16384: _backward fp16 sm_90": 8,
    },
    "sums of a segment and of the context are held at once, and on sm_80 the queries too": {
        "attention, chunks of pages 64: _forward fp32 sm_90": 8,
        "attention 128: _forward fp32 sm_80": 16,
        "attention 128: _forward bf16 sm_90": 8,
        "attention, chunks of pages 128: _forward bf16 sm_90": 8,
        "attention, decode 128: _forward bf16 sm_90": 32,
        "attention 128: _forward bf16 sm_80": 152,
        "attention, chunks of pages 128: _forward bf16 sm_80": 216,
        "attention 256: _forward bf16 sm_90": 88,
        "attention, chunks of pages 256: _forward bf16 sm_80": 8,
        "attention, chunks of pages 256: _forward bf16 sm_90": 96,
        "attention with a block mask: _forward bf16 sm_80": 192,
        "attention 128: _forward fp16 sm_80": 80,
        "attention, chunks of pages 128: _forward fp16 sm_80": 88,
        "attention 256: _forward fp16 sm_90": 88,
        "attention, chunks of pages 256: _forward fp16 sm_90": 96,
        "attention 128, 1 query head a key head: _forward bf16 sm_80": 136,
        "attention 128, 1 query head a key head: _forward bf16 sm_90": 8,
        "attention, chunks of pages 128, 1 query head a key head: _forward bf16 sm_80": 184,
        "attention, chunks of pages 128, 1 query head a key head: _forward bf16 sm_90": 8,
        "attention, decode 128, 1 query head a key head: _forward bf16 sm_90": 32,
        "attention 128, 64 query heads a key head: _forward bf16 sm_80": 112,
        "attention 128, 64 query heads a key head: _forward bf16 sm_90": 32,
        "attention, chunks of pages 128, 64 query heads a key head: _forward bf16 sm_80": 112,
        "attention, chunks of pages 128, 64 query heads a key head: _forward bf16 sm_90": 24,
        "attention, decode 128, 64 query heads a key head: _forward bf16 sm_90": 64,
        "attention of a shared prefix: _forward bf16 sm_80": 152,
        "attention of a shared prefix: _forward bf16 sm_90": 8,
    },
    "the same, beside what takes values that are not finite out of a tile that not all of its rows see": {
        "attention, chunks of pages 64: _forward bf16 sm_80": 256,
        "attention with a block mask: _forward bf16 sm_90": 8,
        "attention 128, a window of 128: _forward bf16 sm_80": 240,
        "attention 128, a window of 128: _forward bf16 sm_90": 24,
        "attention, chunks of pages 128, a window of 128: _forward bf16 sm_80": 224,
        "attention, chunks of pages 128, a window of 128: _forward bf16 sm_90": 32,
        "attention, decode 128, a window of 128: _forward bf16 sm_80": 240,
        "attention, decode 128, a window of 128: _forward bf16 sm_90": 32,
        "attention, chunks of pages 64: _forward fp16 sm_80": 24,
        "attention 128: _forward fp16 sm_90": 8,
        "attention, chunks of pages 128: _forward fp16 sm_90": 8,
        "attention, decode 128: _forward fp16 sm_90": 32,
        "attention 256, a window and a softcap: _forward bf16 sm_90": 112,
        "attention, chunks of pages 256, a window and a softcap: _forward bf16 sm_90": 80,
        "attention, decode 256, a window and a softcap: _forward bf16 sm_90": 80,
    },
    "two sums of a block, of keys and of values or of queries, and the scores between them": {
        "attention backward 256: _grad_kv bf16 sm_90": 48,
        "attention backward 256: _grad_kv fp16 sm_90": 48,
        "attention backward 64: _grad_kv fp32 sm_80": 8,
        "attention backward 64: _grad_q bf16 sm_80": 24,
        "attention backward 64: _grad_kv bf16 sm_80": 24,
        "attention backward 64: _grad_q fp16 sm_80": 24,
        "attention backward 64: _grad_kv fp16 sm_80": 24,
        "attention backward 128, 1 query head a key head: _grad_kv bf16 sm_90": 64,
        "attention backward 256, a window and a softcap: _grad_kv bf16 sm_90": 80,
        "attention backward 64, a window and sinks: _grad_q bf16 sm_80": 24,
        "attention backward 64, a window and sinks: _grad_kv bf16 sm_80": 24,
    },
    "sums of a segment and of the context are held at once, beside keys that become numbers": {
        "attention, chunks of int8 pages 128: _forward bf16 sm_80": 152,
        "attention, chunks of int8 pages 128: _forward bf16 sm_90": 64,
        "attention, chunks of int8 pages 128, a window of 128: _forward bf16 sm_80": 176,
        "attention, chunks of int8 pages 128, a window of 128: _forward bf16 sm_90": 24,
        "attention, decode of int8 128, a window of 128: _forward bf16 sm_80": 256,
        "attention, decode of int8 128, a window of 128: _forward bf16 sm_90": 40,
    },
    "a tile's sums take half of the registers; between segments those of the ones before are read back beside them": {
        "linear large: _forward bf16 sm_80": 56,
        "linear large, segments: _forward bf16 sm_80": 208,
        "linear large, segments: _forward bf16 sm_90": 168,
        "linear large: _forward fp16 sm_80": 56,
    },
    "a tile's sums take half of the registers, and its logits become probabilities there": {
        "linear_logprobs with entropy: _forward bf16 sm_80": 72,
        "linear_logprobs: _forward bf16 sm_80": 40,
        "linear_logprobs: _forward bf16 sm_90": 16,
    },
    "numbers of the row that a search within a search does not use": {"cut 512: _cut fp32 sm_80": 16},
}
_FIRST_FP8 = 89  # the first target that knows it


@dataclass(frozen=True)
class Launch:
    """One kernel as an operation would launch it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    options: dict[str, Any]
    key: str  # calls with the same one share what is compiled


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """The launches within, instead of which nothing happens."""
    launches: list[Launch] = []
    stock = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(as_launch(kernel, args, options))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = stock


def as_launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """What Triton would compile for the call, as itself decides it from the arguments: which numbers are constants, what is
    divisible by 16."""
    backend = make_backend(GPUTarget("cuda", TARGETS[-1], 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*args, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    key = f"{kernel.fn.__module__}.{kernel.fn.__name__} {specialization} {sorted(rest.items())}"
    return Launch(kernel, signature, constants, attributes, rest, key)


def resources(launch: Launch, target: int) -> dict[str, int]:
    """Registers of a thread, bytes of a thread's stack (what is spilled lies there), and bytes of shared memory."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": made.metadata.shared,
        "warps": made.metadata.num_warps,
        "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
    }


def rows() -> Iterator[dict[str, Any]]:
    for dtype_name, dtype in DTYPES.items():
        for operation, call in (c for name in FAMILIES for c in family(name).calls(dtype)):
            with caught() as launches:
                call()
            for launch in launches:
                for target in TARGETS:
                    if target < _FIRST_FP8 and "*fp8e4nv" in launch.signature.values():
                        continue
                    about = {"operation": operation, "kernel": launch.kernel.fn.__name__, "dtype": dtype_name}
                    yield about | {"target": f"sm_{target}"} | resources(launch, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args()
    columns = (
        "operation",
        "kernel",
        "dtype",
        "target",
        "registers",
        "spilled_bytes",
        "shared_bytes",
        "warps",
        "wgmma",
    )
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] * len(columns)) + " |"]
    print("\n".join(lines), flush=True)
    found = []
    for row in rows():
        found.append(row)
        lines.append("| " + " | ".join(str(row[c]) for c in columns) + " |")
        print(lines[-1], flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"kernel_resources-{time.strftime('%Y-%m-%d')}.json"
        report = {
            "benchmark": "kernel_resources",
            "triton": triton.__version__,
            "machine": machine(),
            "rows": found,
        }
        file.write_text(json.dumps(report, indent=1) + "\n")
        file.with_suffix(".md").write_text("\n".join(lines) + "\n")
    wrong = unlike_promised(found)
    print("\n".join(wrong))
    print(f"{len(found)} kernels, {len(wrong)} unlike what is promised")
    sys.exit(bool(wrong))


def unlike_promised(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with what was found: spills that nobody allowed, allowances for more than there is, and kernels that no
    program has the shared memory for."""
    allowed = {kernel: most for kernels in MAY_SPILL.values() for kernel, most in kernels.items()}
    spilled: dict[str, int] = {}
    for r in found:  # an operation may launch a kernel in several forms
        kernel = f"{r['operation']}: {r['kernel']} {r['dtype']} {r['target']}"
        spilled[kernel] = max(spilled.get(kernel, 0), r["spilled_bytes"])
    wrong = [
        f"{kernel} spills {size} bytes, {allowed.get(kernel, 0)} allowed"
        for kernel, size in spilled.items()
        if size != allowed.get(kernel, 0)
    ]
    wrong += [
        f"{r['operation']}: {r['kernel']} {r['dtype']} {r['target']} takes {r['shared_bytes']} bytes of shared memory, of "
        f"{SHARED_BYTES[r['target']]}"
        for r in found
        if r["shared_bytes"] > SHARED_BYTES[r["target"]]
    ]
    return wrong + [f"{kernel} may spill and is no kernel" for kernel in allowed if kernel not in spilled]


if __name__ == "__main__":
    main()
