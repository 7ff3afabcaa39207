"""SwiGLU and GeGLU as Triton kernels: one pass over memory each way. See `rlhf.kernels.activation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf.kernels.gpu import launch, token_step

_BLOCK = 1024


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # of |x|, so that exp does not overflow
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _activated(g, GELU: tl.constexpr, ERF: tl.constexpr):
    # the activation of g, and its slope
    if ERF:
        share = 0.5 * (1.0 + tl.erf(0.7071067811865476 * g))
        value = g * share
        slope = share + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
    elif GELU:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        t = _tanh(inner)
        value = 0.5 * g * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
    else:
        s = _sigmoid(g)
        value = g * s
        slope = s * (g * (1.0 - s) + 1.0)
    return value, slope


@triton.jit
def _places(num_rows, width, gate_row, up_row, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // width, at % width
    return at, at < num_rows.to(tl.int64) * width, row * gate_row + column, row * up_row + column


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    gate,
    up,
    out,
    num_rows,
    width,
    gate_row,
    up_row,
    GELU: tl.constexpr,
    ERF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, inside, at_gate, at_up = _places(num_rows, width, gate_row, up_row, BLOCK)
    g = tl.load(gate + at_gate, mask=inside, other=0.0)
    u = tl.load(up + at_up, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activated(g.to(tl.float32), GELU, ERF)
    tl.store(out + at, (value.to(g.dtype).to(tl.float32) * u).to(g.dtype), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    gate, up, grad, to_gate, to_up, num_rows, width, gate_row, up_row, GELU: tl.constexpr, ERF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at, inside, at_gate, at_up = _places(num_rows, width, gate_row, up_row, BLOCK)
    g = tl.load(gate + at_gate, mask=inside, other=0.0)
    u = tl.load(up + at_up, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activated(g.to(tl.float32), GELU, ERF)
    tl.store(to_gate + at, (d * u * slope).to(g.dtype), mask=inside)
    tl.store(to_up + at, (d * value).to(g.dtype), mask=inside)


def gated(gate: torch.Tensor, up: torch.Tensor, *, gelu: bool, erf: bool = False) -> torch.Tensor:
    """act(gate) * up for (rows, I), each row together in memory -> contiguous (rows, I)."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        launch(
            _forward, (triton.cdiv(out.numel(), _BLOCK),),
            gate, up, out, len(gate), gate.shape[1], token_step(gate), token_step(up), gelu, erf, _BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def gradients(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, *, gelu: bool, erf: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of gate and up (rows, I), contiguous, for a contiguous grad."""
    to_gate, to_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    if grad.numel():
        launch(
            _backward, (triton.cdiv(grad.numel(), _BLOCK),),
            gate, up, grad, to_gate, to_up, len(gate), gate.shape[1], token_step(gate), token_step(up), gelu, erf, _BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return to_gate, to_up
