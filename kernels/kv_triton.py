"""New tokens' heads as Triton kernels: normed, rotated and written to pages in one pass over memory. See `rlhf.kernels.kv`.

Every number is computed and rounded as `norm_triton` and `rotary_triton` do it; a row's squares are added up over the same
tile as there. Fusing of products and sums is left to no compiler.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf.kernels.gpu import aligned, launch, row_tile, token_step
from rlhf.kernels.kv import _SMALLEST, QUANTISED, KvScales, inverse_of
from rlhf.kernels.rotary_triton import turned

_LARGEST = tl.constexpr(3.0e38)  # a row with a larger number is not finite


@triton.jit
def _nearest_fp8(x):
    # the bytes of fp32 numbers up to 448 as e4m3, ties to even: there is no such conversion before sm_89
    bits = x.to(tl.int32, bitcast=True)
    sign, bits = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    size = bits.to(tl.float32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # the exponent's bias is 7, not 127
    tiny = (size * 512.0 + 12582912.0) - 12582912.0
    return (tl.where(size < 0.015625, tiny.to(tl.int32), normal) | sign).to(tl.uint8)


@triton.jit
def _put(pages, scales, row, i, half, there, first, second, MOST: tl.constexpr, INVERSE: tl.constexpr, SMALLEST: tl.constexpr):  # fmt: skip
    # the halves of rows' numbers to rows of pages; MOST: the format's largest number, 0 for the numbers as they are
    inside = there & (i < half)
    to = row * (2 * half) + i
    if MOST > 0:
        a, b = first.to(tl.float32), second.to(tl.float32)
        wrong = tl.where((tl.abs(a) <= _LARGEST) & (tl.abs(b) <= _LARGEST), 0.0, 1.0)
        finite = tl.max(tl.where(inside, wrong, 0.0), 1)[:, None] == 0.0
        top = tl.max(tl.where(inside, tl.maximum(tl.abs(a), tl.abs(b)), 0.0), 1)[:, None]
        factor = tl.div_rn(tl.full(top.shape, MOST, tl.float32), tl.maximum(top, SMALLEST))
        a, b = tl.where(finite, a * factor, 0.0), tl.where(finite, b * factor, 0.0)
        tl.store(scales + row, tl.where(finite, top * INVERSE, float("nan")), mask=there)
        if MOST == 127:
            tl.store(pages + to, (a + 12582912.0 - 12582912.0).to(tl.int8), mask=inside)
            tl.store(pages + to + half, (b + 12582912.0 - 12582912.0).to(tl.int8), mask=inside)
        else:
            tl.store(pages + to, _nearest_fp8(a), mask=inside)
            tl.store(pages + to + half, _nearest_fp8(b), mask=inside)
    else:
        tl.store(pages + to, first, mask=inside)
        tl.store(pages + to + half, second, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _write(
    x, pages, scales, rows, num_rows, heads, half, x_token,
    MOST: tl.constexpr, INVERSE: tl.constexpr, SMALLEST: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    there = row < num_rows
    at = row // heads * x_token + row % heads * (2 * half) + i
    a = tl.load(x + at, mask=there & (i < half), other=0.0)
    b = tl.load(x + at + half, mask=there & (i < half), other=0.0)
    place = tl.load(rows + row, mask=there, other=0)
    _put(pages, scales, place, i, half, there, a, b, MOST, INVERSE, SMALLEST)


@triton.jit
def _normed_and_turned(
    x, weight, cos, sin, row, there, heads, first_head, dim, x_token, eps,
    NORM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # the halves of heads' numbers, as they are stored
    half = dim // 2
    token, head = row // heads, row % heads
    i = tl.arange(0, HALF)[None, :]
    inside = there & (i < half)
    at = token * x_token + head * dim
    a = tl.load(x + at + i, mask=inside, other=0.0)
    b = tl.load(x + at + half + i, mask=inside, other=0.0)
    dtype = a.dtype
    if NORM:
        column = tl.arange(0, BLOCK)[None, :]
        whole = tl.load(x + at + column, mask=there & (column < dim), other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, 1) / dim + eps)[:, None]
        w_at = weight + (first_head + head) * dim + i
        w_a = tl.load(w_at, mask=inside, other=0.0).to(tl.float32)
        w_b = tl.load(w_at + half, mask=inside, other=0.0).to(tl.float32)
        a = ((a.to(tl.float32) * scale).to(dtype).to(tl.float32) * w_a).to(dtype)
        b = ((b.to(tl.float32) * scale).to(dtype).to(tl.float32) * w_b).to(dtype)
    angle = token * dim + i
    cos_a = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    first, second = turned(a.to(tl.float32), b.to(tl.float32), cos_a, cos_b, sin_a, sin_b, False)
    return first.to(dtype), second.to(dtype)


@triton.jit(do_not_specialize=["num_tokens", "q_programs", "kv_programs"])
def _norm_rotate_write(
    q, k, v, out, k_pages, v_pages, k_scales, v_scales, rows, cos, sin, weight, num_tokens, heads, kv_heads, dim,
    q_token, k_token, v_token, eps, q_programs, kv_programs,
    NORM: tl.constexpr, MOST: tl.constexpr, INVERSE: tl.constexpr, SMALLEST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # programs of q, then of k, then of v
    program = tl.program_id(0)
    half = dim // 2
    i = tl.arange(0, HALF)[None, :]
    if program < q_programs:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        there = row < num_tokens * heads
        a, b = _normed_and_turned(
            q, weight, cos, sin, row, there, heads, 0, dim, q_token, eps, NORM, BLOCK, HALF
        )
        tl.store(out + row * dim + i, a, mask=there & (i < half))
        tl.store(out + row * dim + half + i, b, mask=there & (i < half))
    else:
        program -= q_programs
        is_k = program < kv_programs
        program = tl.where(is_k, program, program - kv_programs)
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        there = row < num_tokens * kv_heads
        place = tl.load(rows + row, mask=there, other=0)
        if is_k:
            a, b = _normed_and_turned(
                k, weight, cos, sin, row, there, kv_heads, heads, dim, k_token, eps, NORM, BLOCK, HALF
            )
            _put(k_pages, k_scales, place, i, half, there, a, b, MOST, INVERSE, SMALLEST)
        else:
            at = row // kv_heads * v_token + row % kv_heads * dim + i
            a = tl.load(v + at, mask=there & (i < half), other=0.0)
            b = tl.load(v + at + half, mask=there & (i < half), other=0.0)
            _put(v_pages, v_scales, place, i, half, there, a, b, MOST, INVERSE, SMALLEST)


def write(pages: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
    """x (N, Hkv, D), each token's heads together, as numbers of pages (P, Hkv, page, D) and scales (P, Hkv, page)."""
    tokens, heads, dim = x.shape
    if not x.numel():
        return
    per_program, _, warps = row_tile(dim)
    launch(
        _write, (triton.cdiv(tokens * heads, per_program),),
        x, pages if pages.dtype == torch.int8 else pages.view(torch.uint8), scales, rows, tokens * heads, heads, dim // 2,
        token_step(x), QUANTISED[pages.dtype], inverse_of(pages.dtype), _SMALLEST, per_program, _half(dim), num_warps=warps,
        enable_fp_fusion=False,
    )  # fmt: skip


def norm_rotate_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weights: torch.Tensor | None,
    eps: float,
    kv_scales: KvScales | None,
) -> torch.Tensor:
    """See `rlhf.kernels.kv.norm_rotate_write`; each token's heads together, cos, sin and weights contiguous."""
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    per_program, block, warps = row_tile(dim)
    q, k = aligned(q), aligned(k)
    q_programs, kv_programs = (triton.cdiv(tokens * h, per_program) for h in (heads, kv_heads))
    most, inverse = 0.0, 0.0
    if kv_scales is not None:
        most, inverse = QUANTISED[k_pages.dtype], inverse_of(k_pages.dtype)
        if k_pages.dtype != torch.int8:
            k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    k_scales, v_scales = (cos, cos) if kv_scales is None else kv_scales
    launch(
        _norm_rotate_write, (q_programs + 2 * kv_programs,),
        q, k, v, out, k_pages, v_pages, k_scales, v_scales, rows, cos, sin, cos if weights is None else weights, tokens, heads,
        kv_heads, dim, *map(token_step, (q, k, v)), eps, q_programs, kv_programs,
        NORM=weights is not None, MOST=most, INVERSE=inverse, SMALLEST=_SMALLEST, ROWS=per_program, BLOCK=block,
        HALF=_half(dim), num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _half(dim: int) -> int:
    return triton.next_power_of_2(max(dim // 2, 8))
