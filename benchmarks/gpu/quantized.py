"""Linears with weights of 8 and 4 bits on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.measure import DEVICE, TOLERANCES, Check, Timing, kind, made, same, time_ms
from rlhf.kernels import quantized_triton
from rlhf.kernels.quantized import QuantizedWeight, dequantize, quantize, quantized_linear

GOAL = (
    0.7  # of a copy's bandwidth, counted on the weights' bytes, where few rows make a product wait for them
)
_SHAPES = ((3072, 1024), (1024, 3072), (12288, 4096), (4096, 12288))  # out, in: Qwen3 0.6B and 8B
_FORMATS = ((8, 32), (4, 32), (4, 128))


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    for bits, group in _FORMATS[:2]:
        values = torch.zeros(1024, 1024 * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
        scales = torch.zeros(1024, 1) if bits == 8 else torch.zeros(1024, 1024 // group, dtype=torch.bfloat16)
        bias = torch.zeros(1024, dtype=dtype)
        for rows in (16, 256):
            x = torch.zeros(rows, 1024, dtype=dtype)
            name = f"quantized_linear {bits} bits, groups of {group}, {rows} rows"

            of = {"bits": bits, "group": group}
            given = (x, values, scales, bias)
            yield name, functools.partial(quantized_triton.quantized_linear, *given, **of)


def checks(quick: bool) -> Iterator[Check]:
    shapes = ((80, 128),) if quick else ((80, 256), (1000, 1024), (1024, 3072))
    for dtype, tolerance in TOLERANCES.items():
        for bits, group in _FORMATS[: 2 if quick else None]:
            for outs, inner in shapes:
                q, bias = _weight(outs, inner, bits, group), made(outs, dtype=dtype, seed=2)
                x = made(3 if quick else 200, inner, dtype=dtype)
                whole = quantized_linear(x, q, bias)
                want = F.linear(x.double(), dequantize(q, torch.float64), bias.double())
                error = float((whole.double() - want).abs().max() / want.abs().max())
                name = f"quantized_linear {outs} x {inner}, {bits} bits, groups of {group}, {kind(dtype)}"
                yield Check(name, error <= tolerance, f"{error:.1e} of the largest, {tolerance:.0e} allowed")
                for count in (1, 2) if quick else (1, 16, 33, 128, 129):
                    part = quantized_linear(x[:count], q, bias)
                    yield same(f"{name}, {count} rows", part, whole[:count])


def timings(top: dict[str, float]) -> Iterator[Timing]:
    for outs, inner in _SHAPES:
        weight = made(outs, inner)
        for bits, group in _FORMATS[:2]:
            q = quantize(weight, bits, group)
            for rows in (1, 16, 64, 1024):
                x = made(rows, inner, seed=1)
                ms = time_ms(lambda x=x, q=q: quantized_linear(x, q))
                goal = GOAL if rows <= 16 and outs * inner >= 1 << 24 else None
                against = time_ms(lambda x=x, w=weight: F.linear(x, w)) / ms
                yield Timing(
                    f"quantized_linear, {bits} bits", f"{rows} x {inner} to {outs}", ms, q.nbytes / ms / top["copy"], goal,
                    "F.linear, bf16", against,
                )  # fmt: skip


def _weight(outs: int, inner: int, bits: int, group: int) -> QuantizedWeight:
    q = quantize(made(outs, inner, dtype=torch.float32, seed=1), bits, group)
    assert not q.blocked or DEVICE == "cpu"
    return q
