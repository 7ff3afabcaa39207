"""Log-probs, entropies and their slopes of rows of logits as Triton kernels. See `rlhf.kernels.logprob`.

A row is cut into blocks of 256 tokens. Each gives its maximum m, sum of e^(z - m) and sum of e^(z - m) (z - m), base 2;
`_join` adds them up, a row a program. The sums of a block do not depend on the order of its terms: each term is cut into a
multiple of 2^-15 and one of 2^-31, of which 256 add up in fp32 without rounding (Demmel & Nguyen 2013, "Fast reproducible
floating-point summation"). So logits that lie in memory and those that a product holds in its registers
(`rlhf.kernels.linear_logprob_triton`) give the same bits, whatever thread has which of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rlhf.kernels.gpu import launch

BLOCK = 256  # tokens of a block
_BLOCKS = 16  # of a program
_WIDTH = 2048  # tokens of a row that a program makes the slopes of
_WARPS = 4
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_COARSE = tl.constexpr(384.0)  # 1.5 * 2^23 * 2^-15: added and taken away, it rounds to multiples of 2^-15
_FINE = tl.constexpr(0.005859375)  # 1.5 * 2^23 * 2^-31


@triton.jit
def over(z, t):
    """z / t for t > 0, rounded as IEEE's division, without its branches (Markstein 1990)."""
    inverse = tl.div_rn(tl.full(t.shape, 1.0, tl.float32), t)
    t, inverse = tl.broadcast_to(t, z.shape), tl.broadcast_to(inverse, z.shape)
    q = z * inverse
    rest = tl.fma(-q, t, z)
    return tl.where(tl.abs(q) < float("inf"), tl.fma(rest, inverse, q), q)  # infinities stay, those of q too


@triton.jit
def _exact_sum(coarse, rest, axis: tl.constexpr):
    return tl.sum(coarse, axis) + tl.sum((rest + _FINE) - _FINE, axis)


@triton.jit
def block_sums(z, axis: tl.constexpr, ENTROPY: tl.constexpr):
    """Of blocks of fp32 scores z along the last axis, -inf where there is none: maxima, sums, sums with (z - m), base 2."""
    m = tl.max(z, axis)
    safe = tl.expand_dims(tl.where(m == float("-inf"), 0.0, m), axis)
    d = (z - safe) * _LOG2E
    e = tl.exp2(d)
    coarse = (e + _COARSE) - _COARSE
    total = _exact_sum(coarse, e - coarse, axis)
    weighted = total
    if ENTROPY:
        d = tl.where(e > 0, d, 0.0)
        coarse = tl.fma(e, d, _COARSE) - _COARSE
        weighted = _exact_sum(coarse, tl.fma(e, d, -coarse), axis)
    return m, total, weighted


@triton.jit
def _parts(
    logits, temperatures, targets, picked, tops, totals, weighted, vocabulary, blocks, row_stride,
    SCALED: tl.constexpr, ENTROPY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    z = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=float("-inf")).to(
        tl.float32
    )
    if SCALED:
        z = over(z, tl.full((1, 1), tl.load(temperatures + row), tl.float32))
    target = tl.load(targets + row)
    tl.store(picked + row + tl.zeros_like(token), z, mask=(token == target) & (token < vocabulary))
    m, total, more = block_sums(z, 1, ENTROPY)
    at = row * blocks + block
    tl.store(tops + at, m, mask=block < blocks)
    tl.store(totals + at, total, mask=block < blocks)
    if ENTROPY:
        tl.store(weighted + at, more, mask=block < blocks)


@triton.jit
def _join(
    picked, tops, totals, weighted, logprobs, entropies, top, log_total, blocks,
    ENTROPY: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    at, there = row * blocks + block, block < blocks
    m = tl.load(tops + at, mask=there, other=float("-inf"))
    most = tl.max(m, 0)
    d = tl.where(m == float("-inf"), 0.0, (m - most) * _LOG2E)
    scale = tl.where(m == float("-inf"), 0.0, tl.exp2(d))
    d = tl.where(scale > 0, d, 0.0)  # far below, it may be infinite
    parts = tl.load(totals + at, mask=there, other=0.0)
    total = tl.sum(parts * scale, 0)
    log = tl.log2(total)
    tl.store(top + row, most)
    tl.store(log_total + row, log)
    tl.store(logprobs + row, ((tl.load(picked + row) - most) * _LOG2E - log) * _LN2)
    if ENTROPY:
        more = tl.load(weighted + at, mask=there, other=0.0)
        tl.store(entropies + row, (log - tl.sum((more + d * parts) * scale, 0) / total) * _LN2)


@triton.jit(do_not_specialize=["first"])
def _slopes(
    logits, out, temperatures, targets, top, log_total, grad, grad_entropy, entropies, columns, first, row_stride,
    out_row,
    SCALED: tl.constexpr, ENTROPY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # with z = logits / T, p their softmax: dz = g ([token = target] - p) - g_H p (log p + H), over T; `first` is the
    # token of the first column
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = column < columns
    z = tl.load(logits + row * row_stride + column, mask=there, other=float("-inf")).to(tl.float32)
    if SCALED:
        t = tl.load(temperatures + row)
        z = over(z, tl.full((1,), t, tl.float32))
    log = (z - tl.load(top + row)) * _LOG2E - tl.load(log_total + row)
    p = tl.exp2(log)
    g = tl.load(grad + row)
    slope = tl.where(first + column == tl.load(targets + row), g, 0.0) - g * p
    if ENTROPY:
        spread = tl.where(p > 0, log * _LN2 + tl.load(entropies + row), 0.0)
        slope -= tl.load(grad_entropy + row) * p * spread
    if SCALED:
        slope = slope / t
    tl.store(out + row * out_row + column, slope.to(out.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class Parts:
    """What M rows' blocks of tokens give, fp32."""

    picked: torch.Tensor  # (M,) the targets' scores; NaN where the target is no token
    tops: torch.Tensor  # (M, blocks) maxima
    totals: torch.Tensor  # (M, blocks)
    weighted: torch.Tensor  # (M, blocks), or anything without entropies

    def of(self, rows: slice) -> Parts:
        return Parts(*(x[rows] for x in (self.picked, self.tops, self.totals, self.weighted)))


class Rows(NamedTuple):
    """(M,) fp32 each."""

    logprobs: torch.Tensor  # nats
    entropies: torch.Tensor | None  # nats
    top: torch.Tensor  # the largest score
    log_total: torch.Tensor  # base 2 logarithm of the sum of e^(score - top)


@dataclass(frozen=True)
class Scale:
    """Temperatures (M,) fp32, and whether they are anything but 1."""

    temperatures: torch.Tensor
    scaled: bool

    def of(self, rows: slice) -> Scale:
        return Scale(self.temperatures[rows], self.scaled)


def scale_of(temperature: float | torch.Tensor, rows: int, device: torch.device) -> Scale:
    if isinstance(temperature, torch.Tensor):
        return Scale(temperature.float().contiguous(), True)
    return Scale(torch.full((rows,), temperature, dtype=torch.float32, device=device), temperature != 1.0)


def empty_parts(rows: int, vocabulary: int, entropy: bool, device: torch.device) -> Parts:
    shape = (rows, triton.cdiv(vocabulary, BLOCK))
    tops, totals = (torch.empty(shape, dtype=torch.float32, device=device) for _ in "mt")
    picked = torch.full((rows,), torch.nan, dtype=torch.float32, device=device)
    return Parts(picked, tops, totals, torch.empty_like(totals) if entropy else totals)


def fill_parts(
    logits: torch.Tensor, targets: torch.Tensor, scale: Scale, parts: Parts, entropy: bool
) -> None:
    """logits (M, V) whose rows' numbers lie one after another."""
    rows, blocks = parts.tops.shape
    launch(
        _parts, (rows, triton.cdiv(blocks, _BLOCKS)),
        logits, scale.temperatures, targets, parts.picked, parts.tops, parts.totals, parts.weighted, logits.shape[1],
        blocks, logits.stride(0), SCALED=scale.scaled, ENTROPY=entropy, BLOCKS=_BLOCKS, BLOCK=BLOCK, num_warps=_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip


def join(parts: Parts, entropy: bool) -> Rows:
    rows, blocks = parts.tops.shape
    logprobs, entropies, top, log_total = (torch.empty_like(parts.picked) for _ in range(4))
    launch(
        _join, (rows,),
        parts.picked, parts.tops, parts.totals, parts.weighted, logprobs, entropies, top, log_total, blocks,
        ENTROPY=entropy, BLOCKS=triton.next_power_of_2(blocks), num_warps=_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return Rows(logprobs, entropies if entropy else None, top, log_total)


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float | torch.Tensor, entropy: bool
) -> Rows:
    """logits (M, V), neither of them 0; targets (M,) int64."""
    logits, targets = logits if logits.stride(1) == 1 else logits.contiguous(), targets.contiguous()
    parts = empty_parts(len(logits), logits.shape[1], entropy, logits.device)
    fill_parts(logits, targets, scale_of(temperature, len(logits), logits.device), parts, entropy)
    return join(parts, entropy)


def gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor,
    rows: Rows,
    grad: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """That of logits (M, V), from those of log-probs and entropies (M,) fp32."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    scale = scale_of(temperature, len(logits), logits.device)
    write_slopes(logits, out, targets.contiguous(), scale, rows, grad, grad_entropy)
    return out


def write_slopes(
    logits: torch.Tensor,
    out: torch.Tensor,
    targets: torch.Tensor,
    scale: Scale,
    rows: Rows,
    grad: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    first: int = 0,
) -> None:
    """The gradient of logits (M, n), the columns from `first` of a vocabulary, to `out`, which may be the logits, from
    those of log-probs and entropies (M,) fp32."""
    height, columns = logits.shape
    grad = torch.zeros_like(rows.top) if grad is None else grad.contiguous()
    more = grad if grad_entropy is None else grad_entropy.contiguous()
    launch(
        _slopes, (height, triton.cdiv(columns, _WIDTH)),
        logits, out, scale.temperatures, targets, rows.top, rows.log_total, grad, more,
        grad if rows.entropies is None else rows.entropies, columns, first, logits.stride(0), out.stride(0),
        SCALED=scale.scaled, ENTROPY=grad_entropy is not None, WIDTH=_WIDTH, num_warps=_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip
