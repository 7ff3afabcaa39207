"""Sampling as Triton kernels: one for the cuts, one that draws. See `rlhf.kernels.sampling`.

The noise of a token takes two logarithms, and few tokens can win: a block of tokens whose scores plus a bound of their noise
stay below the best so far is passed over. The largest of scores is the same in whatever parts it is looked for, so that
long rows are shared out among programs where there are few.

Cuts are thresholds of the score, found exactly and without sorting by one program a row, which mostly reads the row twice.
The first pass keeps each lane's largest score; the k-th largest of these bounds the k-th largest score of all from below (for
top-p, that of half the lanes). The second puts the few scores from the bound on one after another, and the ordered bits of
a float are searched among these. Where they do not hold enough (a flat row under top-p, a large k) four passes narrow the
threshold down, one gathers what is left around it, one adds up the mass: eight in all (14 for both), and more only where more scores than
there is room for are nearly alike, or a k above the number of lanes meets scores far away. A row without top-k and top-p is read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf.kernels.gpu import aligned, launch

_DRAWN = 4096  # tokens that one program draws from at once
_LANES = 4096  # tokens that the cuts look at at once
_PROGRAMS = 512  # that rows are shared out among if there are fewer rows

_ROOM = tl.constexpr(2)  # times as many scores as lanes can be put together
_CUTS = tl.constexpr(4)  # thresholds that a pass tries
_PASSES = tl.constexpr(4)  # before what is left is gathered
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
def _survey(logits, width, temperature, lanes, LANES: tl.constexpr):
    # the largest score, and the smallest that is finite; each lane's largest goes to `lanes`
    most = tl.full((LANES,), _NONE, tl.float32)
    least = tl.full((LANES,), float("inf"), tl.float32)
    for first in range(0, width, LANES):
        score = _scores(logits, first + tl.arange(0, LANES), width, temperature)
        most = tl.maximum(most, score)
        least = tl.minimum(least, tl.where(score > _NONE, score, float("inf")))
    tl.store(lanes + tl.arange(0, LANES), most)
    tl.debug_barrier()
    top = tl.max(most, 0)
    return top, tl.minimum(tl.min(least, 0), top)


@triton.jit
def _gather(logits, width, temperature, top, low, high, together, LANES: tl.constexpr):
    # puts the scores in [low, high) one after another, as many as there is room for; how many there are, the mass of all of
    # the row, and the smallest and the largest of those
    mass = tl.zeros((LANES,), tl.float32)
    count = tl.full((), 0, tl.int32)
    smallest, largest = tl.full((), float("inf"), tl.float32), tl.full((), _NONE, tl.float32)
    tl.debug_barrier()
    for first in range(0, width, LANES):
        score = _scores(logits, first + tl.arange(0, LANES), width, temperature)
        mass += tl.exp(score - top)
        inside = tl.where(score >= high, 0, (score >= low).to(tl.int32))
        here = tl.sum(inside, 0)
        if here > 0:
            place = count + tl.cumsum(inside, 0) - 1
            tl.store(together + place, score, mask=(inside > 0) & (place < _ROOM * LANES))
            count += here
            smallest = tl.minimum(smallest, tl.min(tl.where(inside > 0, score, float("inf")), 0))
            largest = tl.maximum(largest, tl.max(tl.where(inside > 0, score, _NONE), 0))
    tl.debug_barrier()
    return count, tl.sum(mass, 0), smallest, largest


@triton.jit
def _amount(logits, width, temperature, top, floor, MASS: tl.constexpr, LANES: tl.constexpr):
    # of the scores from `floor` on: how many, or their mass
    total = tl.zeros((LANES,), tl.float32)
    for first in range(0, width, LANES):
        column = first + tl.arange(0, LANES)
        score = _scores(logits, column, width, temperature)
        amount = tl.exp(score - top) if MASS else tl.where(column < width, 1.0, 0.0)
        total += tl.where(score >= floor, amount, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _narrower(
    logits, width, temperature, top, start, end, beyond, wanted, orders, MASS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    # One pass: which part of [start, end), cut at `orders`, has the threshold; `beyond` is the amount from `end` on. The part
    # is of one where the amount is exactly what was wanted.
    thresholds = _at_order(orders)[:, None]
    total = tl.zeros((_CUTS, LANES), tl.float32)
    for first in range(0, width, LANES):
        column = first + tl.arange(0, LANES)
        score = _scores(logits, column, width, temperature)
        amount = tl.exp(score - top) if MASS else tl.where(column < width, 1.0, 0.0)
        total += tl.where(score[None, :] >= thresholds, amount[None, :], 0.0)
    amounts = tl.sum(total, 1)
    has = amounts >= wanted
    exactly = tl.min(tl.where(has, amounts, float("inf")), 0) == wanted
    beyond = tl.max(tl.where(has, beyond, amounts), 0)
    end = tl.min(tl.where(has, end, orders), 0)
    start = tl.max(tl.where(has, orders, start), 0)
    return start, tl.where(exactly, start + 1, end), beyond


@triton.jit
def _search(scores, count, top, start, end, wanted, MASS: tl.constexpr, LANES: tl.constexpr):
    # the largest threshold in [start, end) whose amount of `count` scores is at least `wanted`, which that of `start` is
    while end - start > 1:
        orders = start + tl.maximum((end - start) // (_CUTS + 1), 1) * (1 + tl.arange(0, _CUTS))
        orders = tl.minimum(orders, end - 1)
        start, end, _ = _narrower(scores, count, 1.0, top, start, end, 0.0, wanted, orders, MASS, LANES)
    return start


@triton.jit
def _search_row(
    logits, width, temperature, top, start, end, beyond, wanted, together, MASS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    # `_search` in a row: some passes, first in equal parts of the score, and as soon as there is room for the scores that are
    # left, among these
    share = (1.0 + tl.arange(0, _CUTS)) / (_CUTS + 1)
    even = True
    while end - start > 1:
        for _ in range(_PASSES):
            if end - start > 1:
                low, high = _at_order(start), _at_order(end)
                step = tl.maximum((end - start) // (_CUTS + 1), 1)
                orders = start + step * (1 + tl.arange(0, _CUTS))
                orders = tl.where(even, _order(low + (high - low) * share), orders)
                orders = tl.minimum(tl.maximum(orders, start), end - 1)
                start, end, beyond = _narrower(
                    logits, width, temperature, top, start, end, beyond, wanted, orders, MASS, LANES
                )
        even = False
        if end - start > 1:
            count, unused, smallest, largest = _gather(
                logits, width, temperature, top, _at_order(start), _at_order(end), together, LANES
            )
            # none is left where sums taken in other orders say that of them all none is wanted: `start` keeps the same
            end = tl.where(count > 0, tl.minimum(end, _order(largest) + 1), start + 1)
            start = tl.where(count > 0, tl.maximum(start, _order(smallest)), start)
            if (count <= _ROOM * LANES) & (end - start > 1):
                start = _search(together, count, top, start, end, wanted - beyond, MASS, LANES)
                end = start + 1
    return start


@triton.jit
def _threshold(
    logits, width, temperature, top, least, together, kept, bound, spare, floor, wanted, MASS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    # The largest threshold from `floor` on whose amount is still at least `wanted`. It is a score, or where the amount is
    # exactly what was wanted, between two. Those `kept` together are all from `bound` on.
    held = _amount(together, kept, 1.0, top, floor, MASS, LANES)
    end = _order(top) + 1
    if held >= wanted:
        start = _search(together, kept, top, _order(tl.maximum(floor, bound)), end, wanted, MASS, LANES)
    else:
        end = tl.where(kept > 0, _order(bound), end)
        start = _order(tl.maximum(floor, least))
        start = _search_row(logits, width, temperature, top, start, end, held, wanted, spare, MASS, LANES)
    return _at_order(start)


@triton.jit
def _kept_mass(logits, width, temperature, top, together, kept, bound, floor, LANES: tl.constexpr):
    mass = tl.full((), 0.0, tl.float32)
    if (kept > 0) & (floor >= bound):
        mass = _amount(together, kept, 1.0, top, floor, True, LANES)
    else:
        mass = _amount(logits, width, temperature, top, floor, True, LANES)
    return mass


@triton.jit
def _cut(
    logits, temperature, top_k, top_p, log_min_p, floors, tops, log_masses, scratch, width,
    K: tl.constexpr, P: tl.constexpr, MIN_P: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * width
    warmth = tl.load(temperature + row)
    warmth = tl.where(warmth == 0, 1.0, warmth)
    together = scratch + row * (2 * _ROOM * LANES)
    spare = together + _ROOM * LANES
    top, least = _survey(at, width, warmth, spare, LANES)
    floor, bound = tl.full((), _NONE, tl.float32), tl.full((), _NONE, tl.float32)
    k, p = width, tl.full((), 1.0, tl.float64)
    if K:
        k = tl.load(top_k + row)
        k = tl.where((k > 0) & (k < width), k, width).to(tl.int32)
    if P:
        p = tl.load(top_p + row)
    kept = tl.full((), 0, tl.int32)
    mass = tl.full((), 0.0, tl.float32)
    if (k < width) | (p < 1):
        likely = tl.where(
            k < width, tl.minimum(k, LANES), LANES // 2
        )  # at least so many scores are from `bound` on
        start, end = _order(least), _order(top) + 1
        bound = _at_order(_search(spare, LANES, top, start, end, likely.to(tl.float32), False, LANES))
        count, mass, unused, also_unused = _gather(
            at, width, warmth, top, bound, float("inf"), together, LANES
        )
        kept = tl.where(count <= _ROOM * LANES, count, 0)
    if K:
        if k < width:
            wanted = k.to(tl.float32)
            floor = _threshold(
                at, width, warmth, top, least, together, kept, bound, spare, floor, wanted, False, LANES
            )
    if P:
        if p < 1:
            if k < width:
                mass = _kept_mass(at, width, warmth, top, together, kept, bound, floor, LANES)
            wanted = (p * mass.to(tl.float64)).to(tl.float32)
            # what lies below this, even if it is all of the row, holds less than 1 - p of the mass
            rest = mass * (1.0 - p).to(tl.float32) / width
            least = tl.maximum(least, top + tl.log(rest) - 0.01)
            floor = _threshold(
                at, width, warmth, top, least, together, kept, bound, spare, floor, wanted, True, LANES
            )
    if MIN_P:
        floor = tl.maximum(floor, top + tl.load(log_min_p + row))
    mass = _kept_mass(at, width, warmth, top, together, kept, bound, floor, LANES)
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
    logits = aligned(logits)  # or the order of its sums is another
    rows, width = logits.shape
    floors, tops, log_masses = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    lanes = min(1 << max(width - 1, 127).bit_length(), _LANES)
    scratch = torch.empty((rows, 2 * _ROOM.value * lanes), dtype=torch.float32, device=logits.device)
    launch(
        _cut, (rows,),
        logits, temperature, *(temperature if x is None else x for x in (top_k, top_p, log_min_p)), floors, tops,
        log_masses, scratch, width, top_k is not None, top_p is not None, log_min_p is not None, lanes,
        num_warps=max(lanes // 256, 1),
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
    block = min(1 << max(width - 1, 127).bit_length(), _DRAWN)
    blocks = triton.cdiv(width, block)
    share = triton.cdiv(blocks, min(blocks, triton.cdiv(_PROGRAMS, rows))) * block
    parts = triton.cdiv(width, share)
    best = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
    launch(
        _draw, (rows, parts),
        logits, keys, positions, temperature, temperature if floors is None else floors, best, tokens, width, share,
        floors is not None, block, num_warps=min(max(block // 512, 1), 16),
        enable_fp_fusion=False,
    )  # fmt: skip
    return tokens[:, 0] if parts == 1 else tokens.gather(1, best.argmax(1, keepdim=True))[:, 0]
