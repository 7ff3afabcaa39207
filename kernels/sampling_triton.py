"""Sampling as Triton kernels: one for the cuts, one that draws. See `rlhf.kernels.sampling`.

The noise of a token takes two logarithms, and few tokens can win: a block of tokens whose scores plus a bound of their noise
stay below the best so far is passed over. The largest of scores is the same in whatever parts it is looked for, so that
long rows are shared out among programs where there are few. Cuts are thresholds of the score, found without sorting:
bisection over the ordered bits of a float, four parts a pass, one program a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_DRAWN = 4096  # tokens that one program draws from at once
_COUNTED = 8192  # tokens that one program counts at once
_PROGRAMS = 512  # that rows are shared out among if there are fewer rows

_NONE = tl.constexpr(float("-inf"))
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _key(seeds, positions, row):
    # the low and the high word of kernels/random.py's random_bits
    x = tl.load(seeds + row).to(tl.uint64, bitcast=True)
    x += (tl.load(positions + row).to(tl.uint64, bitcast=True) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x & 0xFFFFFFFF).to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def _words(tokens, low, high):
    # kernels/random.py's token_words
    x = tokens.to(tl.uint32) * 0x9E3779B9 + low
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = ((x ^ (x >> 11)) + high) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def _log(k, f):
    # k log 2 + log(1 + f) for f in [-0.293, 0.415], which is 2 atanh(f / (2 + f))
    s = f / (2.0 + f)
    z = s * s
    tail = z * (z * (z * (z * (1.0 / 9) + 1.0 / 7) + 1.0 / 5) + 1.0 / 3)
    return k * _LN2 + 2.0 * (s + s * tail)


@triton.jit
def _parts(x):
    # x as 2^k (1 + f), f in [-0.293, 0.415]
    bits = x.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23
    return power.to(tl.float32), (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _noise(words):
    # -log(e) with e = -log(1 - x)
    x = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    k, f = _parts(1.0 - x)
    small = x < 0.292893  # 1 - x would lose bits
    k, f = _parts(-_log(tl.where(small, 0.0, k), tl.where(small, -x, f)))
    return -_log(k, f)


@triton.jit
def _noise_bound(words):
    # No less than _noise: e >= x >= its first 23 bits, and log2(1 + f) >= f for f in [0, 1). Both integers become floats as
    # the bits of a larger one, of which something is taken away; the rest of 1e-4 is more than rounding adds.
    first = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    bits = first.to(tl.uint32, bitcast=True)  # exponent and fraction
    shifted = ((bits >> 7) | 0x4B000000).to(tl.float32, bitcast=True)
    return ((127 + 128) * _LN2 + 1e-4) - shifted * (_LN2 * 2.0**-16)


@triton.jit
def _scores(logits, column, width, temperature):
    x = tl.load(logits + column, mask=column < width, other=_NONE).to(tl.float32)
    return tl.div_rn(x, tl.zeros_like(x) + temperature)


@triton.jit
def _draw(
    logits, seeds, positions, temperature, floors, best_scores, best_tokens, width, share,
    CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low, high = _key(seeds, positions, row)
    warmth = tl.load(temperature + row)
    noisy = tl.where(warmth == 0, 0.0, 1.0)
    warmth = tl.where(warmth == 0, 1.0, warmth)
    at = logits + row * width
    best, token = tl.full((), _NONE, tl.float32), tl.full((), 0, tl.int32)
    for first in range(part * share, min((part + 1) * share, width), BLOCK):
        column = first + tl.arange(0, BLOCK)
        score = _scores(at, column, width, warmth)
        if CUT:
            score = tl.where(score >= tl.load(floors + row), score, _NONE)
        words = _words(column, low, high)
        if tl.max(score + noisy * _noise_bound(words), 0) > best:
            value, index = tl.max(score + noisy * _noise(words), 0, return_indices=True)
            if value > best:
                best = value
                token = first + index
    place = row * tl.num_programs(1) + part
    tl.store(best_scores + place, best)
    tl.store(best_tokens + place, token.to(tl.int64))


# -- cuts ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _order(x):
    # floats in their order as integers
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _at_order(order):
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _amounts(logits, width, temperature, top, a, b, c, MASS: tl.constexpr, BLOCK: tl.constexpr):
    # of the scores from each of three thresholds on: how many, or their mass
    of_a = tl.zeros((BLOCK,), tl.float32)
    of_b = tl.zeros((BLOCK,), tl.float32)
    of_c = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        score = _scores(logits, column, width, temperature)
        amount = tl.where(column < width, 1.0, 0.0)
        if MASS:
            amount = tl.exp(score - top)
        of_a += tl.where(score >= a, amount, 0.0)
        of_b += tl.where(score >= b, amount, 0.0)
        of_c += tl.where(score >= c, amount, 0.0)
    return tl.sum(of_a, 0), tl.sum(of_b, 0), tl.sum(of_c, 0)


@triton.jit
def _threshold(logits, width, temperature, top, low, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr):
    # The largest threshold whose amount is still at least `wanted`, which that of `low` is. It is a score, or where the
    # amount is exactly what was wanted, between two.
    start, end = _order(low), _order(top) + 1
    while end - start > 1:
        step = tl.maximum((end - start) // 4, 1)
        a, b, c = start + step, start + 2 * step, start + 3 * step
        of_a, of_b, of_c = _amounts(
            logits, width, temperature, top, _at_order(a), _at_order(b), _at_order(c), MASS, BLOCK
        )
        has_a, has_b, has_c = of_a >= wanted, of_b >= wanted, of_c >= wanted
        above = tl.where(has_a, tl.where(has_b, tl.where(has_c, end, c), b), a)
        amount = tl.where(has_a, tl.where(has_b, tl.where(has_c, of_c, of_b), of_a), -1.0)
        start = tl.where(has_a, tl.where(has_b, tl.where(has_c, c, b), a), start)
        end = tl.where(amount == wanted, start + 1, tl.minimum(end, above))
    return _at_order(start)


@triton.jit
def _cut(
    logits, temperature, top_k, top_p, log_min_p, floors, tops, log_masses, width,
    K: tl.constexpr, P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * width
    warmth = tl.load(temperature + row)
    warmth = tl.where(warmth == 0, 1.0, warmth)
    most = tl.full((BLOCK,), _NONE, tl.float32)
    for first in range(0, width, BLOCK):
        most = tl.maximum(most, _scores(at, first + tl.arange(0, BLOCK), width, warmth))
    top = tl.max(most, 0)
    floor = tl.full((), _NONE, tl.float32)
    if K:
        k = tl.load(top_k + row)
        if (k > 0) & (k < width):
            floor = _threshold(at, width, warmth, top, floor, k.to(tl.float32), False, BLOCK)
    mass, _, _ = _amounts(at, width, warmth, top, floor, top, top, True, BLOCK)
    if P:
        p = tl.load(top_p + row)
        if p < 1:
            wanted = (p * mass.to(tl.float64)).to(tl.float32)
            floor = _threshold(at, width, warmth, top, floor, wanted, True, BLOCK)
    if MIN_P:
        floor = tl.maximum(floor, top + tl.load(log_min_p + row))
    if P or MIN_P:
        mass, _, _ = _amounts(at, width, warmth, top, floor, top, top, True, BLOCK)
    tl.store(floors + row, floor)
    tl.store(tops + row, top)
    tl.store(log_masses + row, tl.log(mass))


def cut(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    log_min_p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits (R, V), contiguous, at temperature (R,), 0 as 1: the score from which on tokens are kept, the largest score,
    and the logarithm of the kept ones' mass, exp(score - largest). Each (R,) fp32."""
    rows, width = logits.shape
    floors, tops, log_masses = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    block, warps = _tile(width, _COUNTED)
    _cut[(rows,)](
        logits, temperature, *(temperature if x is None else x for x in (top_k, top_p, log_min_p)), floors, tops,
        log_masses, width, top_k is not None, top_p is not None, log_min_p is not None, block, num_warps=warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return floors, tops, log_masses


def draw(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    floors: torch.Tensor | None,
) -> torch.Tensor:
    """(R,) int64: of logits (R, V), contiguous, the token of the largest score plus noise among scores from floors (R,) on;
    temperature (R,), 0 = without noise."""
    rows, width = logits.shape
    block, warps = _tile(width, _DRAWN)
    blocks = triton.cdiv(width, block)
    share = triton.cdiv(blocks, min(blocks, triton.cdiv(_PROGRAMS, rows))) * block
    parts = triton.cdiv(width, share)
    best = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
    _draw[(rows, parts)](
        logits, keys, positions, temperature, temperature if floors is None else floors, best, tokens, width, share,
        floors is not None, block, num_warps=warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return tokens[:, 0] if parts == 1 else tokens.gather(1, best.argmax(1, keepdim=True))[:, 0]


def _tile(width: int, most: int) -> tuple[int, int]:
    """(tokens, warps) of a program."""
    block = min(1 << max(width - 1, 127).bit_length(), most)
    return block, min(max(block // 512, 1), 16)
