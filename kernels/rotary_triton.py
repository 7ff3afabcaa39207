"""Rotary position embedding as a Triton kernel: one pass over memory, in place too. See `rlhf.kernels.rotary`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf.kernels.gpu import launch, token_step

_PAIRS = 1024  # half-pairs of one program, about


@triton.jit
def turned(a, b, cos_a, cos_b, sin_a, sin_b, TRANSPOSED: tl.constexpr):
    # the halves of rotated pairs; which product is rounded is said, so that every kernel has the same bits
    if TRANSPOSED:
        return tl.fma(a, cos_a, b * sin_b), tl.fma(b, cos_b, -(a * sin_a))
    return tl.fma(a, cos_a, -(b * sin_a)), tl.fma(b, cos_b, a * sin_b)


@triton.jit(do_not_specialize=["num_rows"])
def _rotary(
    x, cos, sin, out, num_rows, heads, dim, x_token, out_token,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    half = dim // 2
    i = tl.arange(0, HALF)[None, :]
    inside = (row < num_rows) & (i < half)
    token, head = row // heads, row % heads
    a_at = token * x_token + head * dim + i
    angle = token * dim + i
    a = tl.load(x + a_at, mask=inside, other=0.0)
    b = tl.load(x + a_at + half, mask=inside, other=0.0).to(tl.float32)
    cos_a = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    dtype = a.dtype
    first, second = turned(a.to(tl.float32), b, cos_a, cos_b, sin_a, sin_b, TRANSPOSED)
    to = token * out_token + head * dim + i
    tl.store(out + to, first.to(dtype), mask=inside)
    tl.store(out + to + half, second.to(dtype), mask=inside)


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor, transposed: bool = False
) -> torch.Tensor:
    """x and out (N, heads, D), each token's heads together; cos, sin (N, D), contiguous. out may be x."""
    tokens, heads, dim = x.shape
    if x.numel():
        half = 1 << max(dim // 2 - 1, 7).bit_length()
        rows = max(1, _PAIRS // half)
        launch(
            _rotary, (triton.cdiv(tokens * heads, rows),),
            x, cos, sin, out, tokens * heads, heads, dim, token_step(x), token_step(out), transposed, rows, half, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
