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
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from rlhf.kernels import gpu, native
from rlhf.kernels.activation import swiglu
from rlhf.kernels.attention import Plan, attend_packed, attend_paged, write_kv
from rlhf.kernels.norm import add_rms_norm, rms_norm
from rlhf.kernels.rotary import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOALS = {  # shares that the kernels are to reach on an H200
    "rms_norm": 0.85,
    "add_rms_norm": 0.85,
    "swiglu": 0.85,
    "rotary": 0.85,
    "decode attention": 0.85,
    "attention forward": 0.60,
    "attention backward": 0.45,
}
_FLUSH_BYTES = 256 << 20
_EPS = 1e-6


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    said: str


@dataclass(frozen=True)
class Timing:
    name: str
    shape: str
    ms: float
    share: float  # of the copy's bandwidth, or the product's rate
    goal: float | None
    against: str
    ratio: float | None  # its time by ours


# -- correctness ---------------------------------------------------------------------------------------------------------


def made(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


@contextlib.contextmanager
def torch_forms() -> Iterator[None]:
    with mock.patch.object(gpu, "serves", lambda *tensors: False):
        yield


def close(
    name: str, run: Callable[..., torch.Tensor], *inputs: torch.Tensor, tolerance: float
) -> Iterator[Check]:
    """Values and gradients of `run` against its torch form in float64."""
    ours = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got = run(*ours)
    with torch_forms():
        want = run(*wide)
    grad = made(*want.shape, dtype=want.dtype, seed=9)
    found = torch.autograd.grad(got, ours, grad.to(got.dtype))
    with torch_forms():
        wanted = torch.autograd.grad(want, wide, grad.to(got.dtype).double())
    for label, a, b in zip(
        ["values", *(f"gradient {i}" for i in range(len(ours)))], [got, *found], [want, *wanted]
    ):
        a, b = a.detach().double(), b.detach()
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        yield Check(
            f"{name} {label}", error <= tolerance, f"{error:.1e} of the largest, {tolerance:.0e} allowed"
        )


def same(name: str, a: torch.Tensor, b: torch.Tensor) -> Check:
    different = int((a != b).sum())
    return Check(name, different == 0, f"{different} of {a.numel()} numbers differ")


def checks(quick: bool) -> Iterator[Check]:
    tolerances = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    rows = 8 if quick else 300
    for dtype, tolerance in tolerances.items():
        kind = str(dtype).removeprefix("torch.")
        for width in (64, 100, 1024) if quick else (64, 100, 1024, 4096, 16384):
            x, w = made(rows, width, dtype=dtype), made(width, dtype=dtype, seed=1)
            yield from close(
                f"rms_norm {width} {kind}", lambda x, w: rms_norm(x, w, _EPS), x, w, tolerance=tolerance
            )
        g, u = made(rows, 1000, dtype=dtype), made(rows, 1000, dtype=dtype, seed=1)
        yield from close(f"swiglu {kind}", swiglu, g, u, tolerance=tolerance)
        for dim in (64, 128):
            x, cos, sin = (
                made(rows, 4, dim, dtype=dtype),
                made(rows, dim, dtype=dtype),
                made(rows, dim, dtype=dtype, seed=2),
            )
            yield from close(
                f"rotary {dim} {kind}",
                lambda x, c=cos, s=sin: rotate(x, c.to(x.dtype), s.to(x.dtype)),
                x,
                tolerance=tolerance,
            )
        if (
            DEVICE != "cpu" or dtype != torch.bfloat16
        ):  # the interpreter multiplies the 16 bits of bf16 as they are
            yield from attention_checks(dtype, kind, tolerance, quick)
    yield from bits(quick)


def attention_checks(dtype: torch.dtype, kind: str, tolerance: float, quick: bool) -> Iterator[Check]:
    lens = [5, 40] if quick else [5, 700, 1, 300, 64]
    options: list[dict[str, Any]] = (
        [{}, {"window": 20}] if quick else [{}, {"window": 100}, {"softcap": 20.0}]
    )
    for dim in (64,) if quick else (64, 96, 128, 256):
        for heads, kv_heads in ((4, 2),) if quick else ((4, 4), (8, 2), (5, 1)):
            n = sum(lens)
            q, k, v = (
                made(n, h, dim, dtype=dtype, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads))
            )
            for given in options:
                plan = Plan(lens, lens, device=DEVICE)
                yield from close(
                    f"attention {dim} {heads}/{kv_heads} {kind} {given or ''}",
                    lambda q, k, v, p=plan, o=given: attend_packed(q, k, v, p, scale=q.shape[-1] ** -0.5, **o),
                    q, k, v, tolerance=tolerance,
                )  # fmt: skip


# -- bits ----------------------------------------------------------------------------------------------------------------


def bits(quick: bool) -> Iterator[Check]:
    """A row's bits are its own."""
    for width in (128, 1024) if quick else (64, 128, 1024, 2048, 4096, 8192):
        x, w = made(64 if quick else 4096, width), made(width, seed=1)
        whole = rms_norm(x, w, _EPS)
        for count in (1, 7, 64):
            parts = torch.cat([rms_norm(part, w, _EPS) for part in x.split(count)[:8]])
            yield same(f"rms_norm {width}, {count} rows at a time", parts, whole[: len(parts)])
        total = x.clone()
        yield same(f"add_rms_norm {width}", add_rms_norm(total, x.clone(), w, _EPS), rms_norm(x + x, w, _EPS))
    for dtype in (torch.bfloat16, torch.float32):
        yield from attention_bits(dtype, quick)


def attention_bits(dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """Packed, in chunks from pages, and token after token: the same numbers."""
    lens = [20, 300] if quick else [17, 300, 1025, 700]
    heads, kv_heads, dim, page = 8, 2, 64 if quick else 128, 64
    kind, scale, n = str(dtype).removeprefix("torch."), dim**-0.5, sum(lens)
    q, k, v = (made(n, h, dim, dtype=dtype, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    packed = attend_packed(q, k, v, Plan(lens, lens, device=DEVICE), scale=scale)
    pages_each = -(-max(lens) // page)
    table = torch.randperm(pages_each * len(lens), generator=torch.Generator().manual_seed(3)).view(
        len(lens), -1
    )
    k_pages, v_pages = (
        torch.zeros(table.numel(), kv_heads, page, dim, dtype=dtype, device=DEVICE) for _ in "kv"
    )
    starts = [sum(lens[:i]) for i in range(len(lens))]
    slots = torch.cat(
        [
            table[s, torch.arange(length) // page] * page + torch.arange(length) % page
            for s, length in enumerate(lens)
        ]
    )
    write_kv(k_pages, v_pages, k, v, slots.to(DEVICE))
    for alone, (start, length) in enumerate(zip(starts, lens)):
        own = slice(start, start + length)
        got = attend_packed(q[own], k[own], v[own], Plan([length], [length], device=DEVICE), scale=scale)
        yield same(f"attention {kind}, sequence {alone} alone", got, packed[own])
    for chunk in (300,) if quick else (1, 2, 64, 100, 300):
        # the last `chunk` tokens of every sequence
        counts = [min(chunk, length) for length in lens]
        plan = Plan(counts, lens, page_table=table, page_tokens=page, device=DEVICE)
        own = torch.cat(
            [torch.arange(s + length - c, s + length) for s, length, c in zip(starts, lens, counts)]
        ).to(DEVICE)
        got = attend_paged(q[own], k_pages, v_pages, plan, scale=scale)
        yield same(f"attention {kind}, the last {chunk} from pages", got, packed[own])


# -- times ---------------------------------------------------------------------------------------------------------------


def time_ms(run: Callable[[], Any], repetitions: int = 20) -> float:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    for _ in range(3):
        run()
    found = []
    for _ in range(repetitions):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def ceilings() -> dict[str, float]:
    """A copy's bandwidth in bytes and a bf16 product's rate in operations, per ms."""
    x = torch.empty(1 << 29, dtype=torch.bfloat16, device=DEVICE)
    y, a = torch.empty_like(x), made(8192, 8192)
    return {
        "copy": 2 * x.nbytes / time_ms(lambda: y.copy_(x)),
        "matmul": 2 * 8192**3 / time_ms(lambda: a @ a),
    }


def timings(top: dict[str, float]) -> Iterator[Timing]:
    for rows, width in ((16384, 1024), (16384, 4096), (4096, 8192)):
        yield from row_timings(top, rows, width)
    for dim, heads, kv_heads in ((128, 32, 8), (128, 16, 8), (64, 32, 8)):
        for batch, context in ((32, 1024), (32, 8192), (128, 2048), (1, 8192)):
            yield decode_timing(top, batch, context, dim, heads, kv_heads)
        for length in (2048, 8192):
            yield from prefill_timings(top, length, dim, heads, kv_heads)


def row_timings(top: dict[str, float], rows: int, width: int) -> Iterator[Timing]:
    x, y, w = made(rows, width), made(rows, width, seed=1), made(width, seed=2)
    change, shape = torch.zeros_like(x), f"{rows} x {width}"

    def timing(
        name: str, passes: float, run: Callable[[], Any], against: str, other: Callable[[], Any]
    ) -> Timing:
        ms = time_ms(run)
        return Timing(
            name, shape, ms, passes * x.nbytes / ms / top["copy"], GOALS[name], against, time_ms(other) / ms
        )

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, w.shape, w, _EPS)

    yield timing("rms_norm", 2, lambda: rms_norm(x, w, _EPS), "F.rms_norm", lambda: norm(x))
    yield timing(
        "add_rms_norm",
        4,
        lambda: add_rms_norm(x, change, w, _EPS),
        "add, F.rms_norm",
        lambda: norm(x + change),
    )
    yield timing("swiglu", 3, lambda: swiglu(x, y), "F.silu(g) * u", lambda: F.silu(x) * y)
    heads, cos = x.view(rows, -1, 128), made(rows, 128)
    passes = 2 + 2 * 128 / width
    yield timing(
        "rotary", passes, lambda: rotate(heads, cos, cos), "torch form", lambda: slow_rotate(heads, cos)
    )


def slow_rotate(x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    with torch_forms():
        return rotate(x, cos, cos)


def decode_timing(
    top: dict[str, float], batch: int, context: int, dim: int, heads: int, kv_heads: int, page: int = 64
) -> Timing:
    num_pages = batch * context // page
    k_pages, v_pages = (made(num_pages, kv_heads, page, dim, seed=i) for i in (1, 2))
    table = torch.arange(num_pages).view(batch, -1)
    plan = Plan([1] * batch, [context] * batch, page_table=table, page_tokens=page, device=DEVICE)
    q, scale = made(batch, heads, dim), dim**-0.5
    ms = time_ms(lambda: attend_paged(q, k_pages, v_pages, plan, scale=scale))
    k, v = (
        x.view(batch, -1, kv_heads, page, dim).transpose(1, 2).reshape(batch, kv_heads, context, dim)
        for x in (k_pages, v_pages)
    )
    other = time_ms(lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True))
    share = 2 * k_pages.nbytes / ms / top["copy"]
    goal = GOALS["decode attention"] if batch >= 32 else None
    shape = f"{batch} x {context}, {heads}/{kv_heads} x {dim}"
    return Timing("decode attention", shape, ms, share, goal, "SDPA, no pages", other / ms)


def prefill_timings(
    top: dict[str, float], length: int, dim: int, heads: int, kv_heads: int
) -> Iterator[Timing]:
    q, k, v = (
        made(length, h, dim, seed=i).requires_grad_() for i, h in enumerate((heads, kv_heads, kv_heads))
    )
    a, b, c = (x.detach().transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
    plan, scale = Plan([length], [length], device=DEVICE), dim**-0.5
    work = 2.0 * length * length * heads * dim  # two products, half of each: causal

    def ours() -> torch.Tensor:
        return attend_packed(q, k, v, plan, scale=scale)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)

    def timing(name: str, work: float, run: Callable[[], Any], other: Callable[[], Any]) -> Timing:
        ms = time_ms(run)
        goal = GOALS[name] if length >= 8192 else None
        shape = f"{length}, {heads}/{kv_heads} x {dim}"
        return Timing(name, shape, ms, work / ms / top["matmul"], goal, "SDPA", time_ms(other) / ms)

    with torch.no_grad():
        yield timing("attention forward", work, ours, sdpa)
    mine, theirs = ours(), sdpa()
    yield timing(
        "attention backward",
        2.5 * work,
        lambda: torch.autograd.grad(mine, (q, k, v), mine, retain_graph=True),
        lambda: torch.autograd.grad(theirs, (a, b, c), theirs, retain_graph=True),
    )


# -- the report ----------------------------------------------------------------------------------------------------------


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
    for check in checks(args.quick):
        found.append(check)
        if not check.passed:
            failed.append(check)
            print(f"FAILED {check.name}: {check.said}", flush=True)
    print(f"{len(found)} checks, {len(failed)} failed, {time.perf_counter() - begun:.0f} s", flush=True)
    times: list[Timing] = []
    top: dict[str, float] = {}
    if DEVICE == "cuda" and not args.quick:
        top = ceilings()
        times = list(timings(top))
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
