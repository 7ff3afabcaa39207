"""y = x W^T + b for weights of 8 or 4 bits as Triton kernels. See `rlhf.kernels.quantized`.

Weights are made whole inside the loop over the inputs: of 8 bits as numbers that every dtype of x holds exactly, scaled
after the sum; of 4 bits scaled and rounded to x's dtype. The inputs are cut into segments, whose number follows from the
weight's shape; each is added up by itself and segments are added in their order, in one program, or by `_join` where few
rows do not fill a GPU. Tiles are of one size. So a row's bits do not depend on the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf.kernels.gpu import launch

_OUTS, _ROWS = 64, 32  # outputs and rows of a tile
_STEP = 64  # inputs of one turn of the loop, at most; for 4 bits that many of each half, of one group
_FULL = 256  # programs that fill a GPU, about
_SEGMENTS = 8  # at most
_FEW = 128  # rows up to which segments are shared out
_JOINED = 1024  # numbers of one program of `_join`


@triton.jit
def _finished(total, scale, bias, BIAS: tl.constexpr):
    return tl.fma(total, scale, bias) if BIAS else total * scale


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, values, scales, bias, out, rows, outs, inner, width, length,
    BITS: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, OUTS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    there, here = n < outs, m < rows
    total = tl.zeros((OUTS, ROWS), tl.float32)
    first = tl.program_id(2) if SPLIT else 0
    for segment in range(first, first + 1 if SPLIT else tl.cdiv(width, length)):
        part = tl.zeros((OUTS, ROWS), tl.float32)
        for start in range(segment * length, tl.minimum((segment + 1) * length, width), STEP):
            inside = start + k < width
            codes = tl.load(
                values + n[:, None] * width + (start + k)[None, :],
                mask=there[:, None] & inside[None, :],
                other=0,
            )
            x_at = x + m[None, :] * inner + (start + k)[:, None]
            a = tl.load(x_at, mask=here[None, :] & inside[:, None], other=0.0)
            if BITS == 8:
                w = codes.to(tl.float32).to(a.dtype)
            else:
                # inputs of the first half lie in the low bits, those of the second in the high ones
                groups = inner // GROUP
                scale = tl.load(scales + n * groups + start // GROUP, mask=there, other=0.0).to(tl.float32)
                w = (((codes & 15).to(tl.float32) - 8.0) * scale[:, None]).to(a.dtype)
                part = tl.dot(w, a, part, input_precision="ieee")
                a = tl.load(x_at + width, mask=here[None, :] & inside[:, None], other=0.0)
                scale = tl.load(scales + n * groups + (width + start) // GROUP, mask=there, other=0.0).to(
                    tl.float32
                )
                w = (((codes >> 4).to(tl.float32) - 8.0) * scale[:, None]).to(a.dtype)
            part = tl.dot(w, a, part, input_precision="ieee")
        total += part
    at = m[None, :] * outs + n[:, None]
    if SPLIT:
        at += tl.program_id(2).to(tl.int64) * rows * outs
    else:
        scale = tl.load(scales + n, mask=there, other=0.0)[:, None] if BITS == 8 else 1.0
        b = tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None] if BIAS else 0.0
        total = _finished(total, scale, b, BIAS)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there[:, None] & here[None, :])


@triton.jit(do_not_specialize=["numbers", "segments"])
def _join(
    parts, scales, bias, out, numbers, outs, segments, BITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, segments):
        total += tl.load(parts + at, mask=inside, other=0.0)
        parts += numbers
    n = at % outs
    scale = tl.load(scales + n, mask=inside, other=0.0) if BITS == 8 else 1.0
    b = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32) if BIAS else 0.0
    tl.store(out + at, _finished(total, scale, b, BIAS).to(out.dtype.element_ty), mask=inside)


def quantized_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    bits: int,
    group: int,
    whole: int | None = None,
) -> torch.Tensor:
    """x (M, in), values (out, in) int8 or (out, in/2) bytes, scales (out, 1) fp32 or (out, in/group) bf16, bias (out,) ->
    (M, out). Of a part of a weight's rows, `whole` is how many rows the one has whose bits they keep."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    (rows, inner), (outs, width) = x.shape, values.shape
    out = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    step = _STEP if x.dtype != torch.float32 else _STEP // 2
    step = min(group, step) if bits == 4 else step
    group = group if bits == 4 else step
    blocks = triton.cdiv(outs, _OUTS)
    most = min(_SEGMENTS, triton.cdiv(_FULL, triton.cdiv(whole or outs, _OUTS)))
    length = triton.cdiv(triton.cdiv(width, most), step) * step
    segments = triton.cdiv(width, length)
    split = segments > 1 and rows <= _FEW
    to = torch.empty(segments, rows, outs, dtype=torch.float32, device=x.device) if split else out
    given = x if bias is None else bias
    launch(
        _forward, (blocks, triton.cdiv(rows, _ROWS), segments if split else 1),
        x, values, scales, given, to, rows, outs, inner, width, length,
        bits, bias is not None, split, _OUTS, _ROWS, step, group, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    if split:
        launch(
            _join, (triton.cdiv(out.numel(), _JOINED),),
            to, scales, given, out, out.numel(), outs, segments, bits, bias is not None, _JOINED, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out
