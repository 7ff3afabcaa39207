"""What every Triton kernel takes of a GPU: registers, spills and shared memory, compiled for sm_80 and sm_90 without one.

    python benchmarks/kernel_resources.py [--out benchmarks/results]

The operations' own launches are caught, not repeated here: the modules in `benchmarks/gpu` call them, and what they
would have launched is compiled. Ends with 1 if a kernel spills that is not in `MAY_SPILL`. Writes a file only with --out.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.gpu_check import OPERATIONS
from benchmarks.running import machine

TARGETS = (80, 90)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What an operation's name begins with: most bytes of a thread, and why
MAY_SPILL = {
    "rms_norm backward 16384": (96, "a row is held whole: x, its gradient and the weight"),
    "attention": (
        168,
        "the sums of a segment and of the context are held at once, and on sm_80 the queries too; most from int8 pages",
    ),
    "linear large": (
        224,
        "a tile's sums take half of the registers; between segments those of the ones before are read back beside them",
    ),
    "linear_logprobs": (64, "a tile's sums take half of the registers"),
}
_TYPES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
}
_TYPES |= {torch.int8: "i8", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv"}
_FIRST_FP8 = 89  # the first target that knows it
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """One kernel as an operation would launch it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    options: dict[str, int]


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
    names = list(inspect.signature(kernel.fn).parameters)
    given = dict(zip(names, args)) | {k: v for k, v in options.items() if k in names}
    constant = {names[i] for i in kernel.constexprs} if hasattr(kernel, "constexprs") else set()
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = given[name]
        if name in constant or type(value) is int and value == 1:  # Triton takes a 1 for a constant
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[i,] = f"*{_TYPES[value.dtype]}", _DIVISIBLE
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[i,] = _DIVISIBLE
    rest = {
        k: v for k, v in options.items() if k in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    }
    return Launch(kernel, signature, constants, attributes, rest)


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
        for operation, call in (c for module in OPERATIONS for c in module.calls(dtype)):
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
    wrong = [r for r in found if r["spilled_bytes"] > may_spill(r["operation"])]
    for row in wrong:
        print(f"{row['operation']} {row['dtype']} {row['target']} spills {row['spilled_bytes']} bytes, "
              f"{may_spill(row['operation'])} allowed")  # fmt: skip
    print(f"{len(found)} kernels, {len(wrong)} spill more than they may")
    sys.exit(bool(wrong))


def may_spill(operation: str) -> int:
    return next((most for name, (most, _) in MAY_SPILL.items() if operation.startswith(name)), 0)


if __name__ == "__main__":
    main()
