"""Operations on rows on a GPU: RMSNorm, gated activations, rotary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.measure import TOLERANCES, Check, Timing, close, kind, made, same, time_ms, torch_forms
from rlhf.kernels import activation_triton, norm_triton, rotary_triton
from rlhf.kernels.activation import geglu, swiglu
from rlhf.kernels.norm import add_rms_norm, rms_norm
from rlhf.kernels.rotary import rotate

GOAL = 0.85  # of a copy's bandwidth, on an H200
_EPS = 1e-6


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    make = functools.partial(torch.zeros, dtype=dtype)
    for width in (64, 128, 1024, 2048, 4096, 8192, 16384):
        x, w = make(64, width), make(width)
        yield f"rms_norm {width}", lambda x=x, w=w: norm_triton.rms_norm(x, w, _EPS)
        yield f"add_rms_norm {width}", lambda x=x, w=w: norm_triton.rms_norm(x, w, _EPS, x)
        yield (
            f"rms_norm backward {width}",
            lambda x=x, w=w: norm_triton.gradients(x, w, _EPS, x, (True, True)),
        )
    for gelu, erf, name in ((False, False, "swiglu"), (True, False, "geglu"), (True, True, "geglu of erf")):
        g, kind = make(64, 4096), {"gelu": gelu, "erf": erf}
        yield name, lambda g=g, kind=kind: activation_triton.gated(g, g, **kind)
        yield f"{name} backward", lambda g=g, kind=kind: activation_triton.gradients(g, g, g, **kind)
    for dim in (64, 128, 256):
        x, cos = make(64, 8, dim), make(64, dim)
        for back in (False, True):
            name = f"rotary{' backward' if back else ''} {dim}"
            yield name, lambda x=x, c=cos, b=back: rotary_triton.rotary(x, c, c, out=x, transposed=b)


def checks(quick: bool) -> Iterator[Check]:
    rows = 8 if quick else 300
    for dtype, tolerance in TOLERANCES.items():
        for width in (64, 100, 1024) if quick else (64, 100, 1024, 4096, 16384):
            x, w = made(rows, width, dtype=dtype), made(width, dtype=dtype, seed=1)
            name = f"rms_norm {width} {kind(dtype)}"
            yield from close(name, lambda x, w: rms_norm(x, w, _EPS), x, w, tolerance=tolerance)
        g, u = made(rows, 1000, dtype=dtype), made(rows, 1000, dtype=dtype, seed=1)
        gates = {"swiglu": swiglu, "geglu": geglu, "geglu of erf": functools.partial(geglu, tanh=False)}
        for name, gated in gates.items():
            yield from close(f"{name} {kind(dtype)}", gated, g, u, tolerance=tolerance)
        for dim in (64, 128):
            x = made(rows, 4, dim, dtype=dtype)
            cos, sin = made(rows, dim, dtype=dtype), made(rows, dim, dtype=dtype, seed=2)
            yield from close(
                f"rotary {dim} {kind(dtype)}",
                lambda x, c=cos, s=sin: rotate(x, c.to(x.dtype), s.to(x.dtype)),
                x,
                tolerance=tolerance,
            )
    yield from _bits(quick)


def timings(top: dict[str, float]) -> Iterator[Timing]:
    for rows, width in ((16384, 1024), (16384, 4096), (4096, 8192)):
        yield from _timings(top, rows, width)


def _bits(quick: bool) -> Iterator[Check]:
    """A row's bits are its own."""
    for width in (128, 1024) if quick else (64, 128, 1024, 2048, 4096, 8192):
        x, w = made(64 if quick else 4096, width), made(width, seed=1)
        whole = rms_norm(x, w, _EPS)
        for count in (1, 7, 64):
            parts = torch.cat([rms_norm(part, w, _EPS) for part in x.split(count)[:8]])
            yield same(f"rms_norm {width}, {count} rows at a time", parts, whole[: len(parts)])
        total = x.clone()
        yield same(f"add_rms_norm {width}", add_rms_norm(total, x.clone(), w, _EPS), rms_norm(x + x, w, _EPS))


def _timings(top: dict[str, float], rows: int, width: int) -> Iterator[Timing]:
    x, y, w = made(rows, width), made(rows, width, seed=1), made(width, seed=2)
    change, shape = torch.zeros_like(x), f"{rows} x {width}"
    heads, cos = x.view(rows, -1, 128), made(rows, 128)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, w.shape, w, _EPS)

    def slow_rotate() -> torch.Tensor:
        with torch_forms():
            return rotate(heads, cos, cos)

    runs = (  # name, passes over x, ours, the other's name, the other
        ("rms_norm", 2, lambda: rms_norm(x, w, _EPS), "F.rms_norm", lambda: norm(x)),
        ("add_rms_norm", 4, lambda: add_rms_norm(x, change, w, _EPS), "add, F.rms_norm", lambda: norm(x + change)),
        ("swiglu", 3, lambda: swiglu(x, y), "F.silu(g) * u", lambda: F.silu(x) * y),
        ("geglu", 3, lambda: geglu(x, y), "F.gelu(g) * u", lambda: F.gelu(x, approximate="tanh") * y),
        ("rotary", 2 + 2 * 128 / width, lambda: rotate(heads, cos, cos), "torch form", slow_rotate),
    )  # fmt: skip
    for name, passes, run, against, other in runs:
        ms = time_ms(run)
        share = passes * x.nbytes / ms / top["copy"]
        yield Timing(name, shape, ms, share, GOAL, against, time_ms(other) / ms)
