"""Sampling one token per row from logits: temperature, banned tokens, top-k, top-p, min-p, and the log-probs of the
choice.

Here: pure functions of tensors. A token is the largest of scores plus Gumbel noise, and the noise is a function of the
row's key, its position and the token (`rlhf.kernels.random`): a row's token and log-probs depend on that row alone,
never on what else is in the batch or where in it the row is. On a CPU with a C++ compiler sampling.cpp runs, on CUDA
sampling_triton.py; else the torch operations. Their noise has the same bits and their scores differ by rounding. Not
here: stop detection and per-request parameters (`rlhf.rollout`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlhf.kernels import gpu, native
from rlhf.kernels.form import NATIVE, TORCH, TRITON, took
from rlhf.kernels.logprob import token_logprobs
from rlhf.kernels.random import exponentials, random_bits, token_words
from rlhf.kernels.threads import worth

_CHUNK_ELEMENTS = 1 << 22  # scores that the torch form works on at once
_ANY = (1 << 63) - 1
_LEAST_NUCLEUS = 1e-12  # the likeliest token
_NUCLEUS_TOKENS = 1024  # likeliest tokens looked at before a nucleus needs the whole vocabulary sorted

Banned = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sampled:
    """One token per row, R rows."""

    tokens: torch.Tensor  # (R,) int64
    logprobs: torch.Tensor  # (R,) fp32, nats: log softmax(logits / T)[token]; T = 1 for greedy rows
    processed_logprobs: torch.Tensor  # (R,) fp32, nats: under the distribution drawn from; 0 for greedy rows


@dataclass(frozen=True)
class _Cuts:
    """What takes tokens away from R rows; None where no row uses it."""

    top_k: torch.Tensor | None  # (R,) int64
    top_p: torch.Tensor | None  # (R,) float64
    log_min_p: torch.Tensor | None  # (R,) fp32

    def of(self, rows: slice) -> _Cuts:
        return _Cuts(*(None if x is None else x[rows] for x in (self.top_k, self.top_p, self.log_min_p)))

    @property
    def any(self) -> bool:
        return not (self.top_k is self.top_p is self.log_min_p is None)


@torch.no_grad()
def sample(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    banned: Banned | None = None,
) -> Sampled:
    """Draw one token per row: argmax_j of score_j + g(key, position, j), ties to the lowest j, where g = -log(e) is
    Gumbel noise (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030).

    logits (R, V) any float dtype; keys (R,) int64, a row's own; positions (R,) int64, which token of the response this is;
    temperature (R,) fp32, 0 = greedy; top_k (R,) int64, 0 = all; top_p (R,) float64, 1 = all; min_p (R,) float64, 0 = all,
    keeps what has at least that share of the likeliest token's probability (Nguyen et al. 2024, arXiv 2407.01082); None =
    no row uses it. banned: (rows, columns) that must not be drawn; they count in `logprobs` and not in
    `processed_logprobs`. Order, which is that of Hugging Face's generate: temperature, ban, top-k, top-p of what top-k
    left, min-p. Equal scores at a cut are all kept. `logprobs` are `token_logprobs` of the same logits, in its bits. A row
    with non-finite logits yields a valid token id with a NaN log-prob, and so does one whose every token is banned or has
    probability 0: then both log-probs are NaN, of a greedy row too. Raises ValueError for shapes, dtypes or devices
    that do not fit, and on a CPU for banned tokens outside the logits.
    """
    _check(logits, keys, positions, temperature, top_k, top_p, min_p, banned)
    native_dtype = logits.dtype == torch.bfloat16 or logits.is_cuda and logits.dtype == torch.float16
    logits = (logits if native_dtype else logits.float()).contiguous()
    top_p = None if top_p is None else top_p.clamp(min=_LEAST_NUCLEUS)
    cuts = _Cuts(top_k, top_p, None if min_p is None else min_p.log().float())
    beside = (keys, positions, temperature, top_k, top_p, min_p, *(banned or ()))
    if not native.plain(logits, *beside) and (hollow := native.hollow(logits, *beside)) is not None:
        floats = (hollow.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        return Sampled(hollow.new_empty(len(logits), dtype=torch.int64), *floats)
    tokens, processed = _form(logits, *beside)(logits, keys, positions, temperature, cuts, banned)
    greedy = temperature == 0
    logprobs = _policy_logprobs(logits, tokens, torch.where(greedy, 1.0, temperature))
    if banned is not None:
        nothing = _nothing_left(tokens, logprobs, banned)
        logprobs, greedy = torch.where(nothing, torch.nan, logprobs), greedy & ~nothing
    if processed is None:
        processed = logprobs
    else:
        of_cut = _cut_rows(logits, cuts, banned) & ~logprobs.isnan()
        processed = torch.where(of_cut, processed, logprobs)
    return Sampled(tokens, logprobs, torch.where(greedy, 0.0, processed))


def _check(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    banned: Banned | None,
) -> None:
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"logits {tuple(logits.shape)} {logits.dtype} must be (R, V) of a float dtype with V > 0"
        )
    of_rows = {
        "keys": (keys, torch.int64),
        "positions": (positions, torch.int64),
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int64),
        "top_p": (top_p, torch.float64),
        "min_p": (min_p, torch.float64),
    }
    for name, (x, dtype) in of_rows.items():
        if x is not None and (x.shape != logits.shape[:1] or x.dtype != dtype or x.device != logits.device):
            raise ValueError(
                f"{name} {tuple(x.shape)} {x.dtype} on {x.device} for logits {tuple(logits.shape)} on {logits.device}; it "
                f"must be ({len(logits)},) {dtype} beside them"
            )
    if logits.device.type == "cpu":  # elsewhere reading the numbers would wait for the device
        for name, (low, high) in {
            "temperature": (0, _ANY),
            "top_k": (0, _ANY),
            "top_p": (0, 1),
            "min_p": (0, 1),
        }.items():
            x = of_rows[name][0]
            if x is None or not native.plain(x) or not x.numel():
                continue
            numbers = x.detach().numpy()  # which says so in a tenth of torch's time
            if not low <= numbers.min() <= numbers.max() <= high:
                raise ValueError(
                    f"{name} {x.tolist()} for logits {tuple(logits.shape)}: numbers must be in [{low}, {high}]"
                )
    if banned is not None:
        _check_banned(logits, *banned)


def _check_banned(logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
    shapes = (
        f"banned rows {tuple(rows.shape)} and columns {tuple(columns.shape)} for logits {tuple(logits.shape)}"
    )
    if rows.dim() != 1 or rows.shape != columns.shape or not rows.dtype == columns.dtype == torch.int64:
        raise ValueError(f"{shapes}, {rows.dtype} and {columns.dtype}: they must be int64 of one length")
    if not rows.device == columns.device == logits.device:
        raise ValueError(
            f"{shapes} on {rows.device}, {columns.device} and {logits.device}: they must be on one device"
        )
    if rows.device.type == "cpu" and rows.numel():
        for x, most in zip((rows, columns), logits.shape):
            if not 0 <= int(x.min()) <= int(x.max()) < most:
                raise ValueError(f"{shapes}: {int(x.min())} to {int(x.max())} is outside [0, {most})")


def _policy_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """(R,) as the trainer computes them; without a pass that divides by 1 where that is seen at once."""
    if not logits.is_cuda and bool((temperature == 1).all()):
        return token_logprobs(logits, tokens)[0]
    return token_logprobs(logits, tokens, temperature)[0]


def _nothing_left(tokens: torch.Tensor, logprobs: torch.Tensor, banned: Banned) -> torch.Tensor:
    """(R,) bool: the rows of which no token could be drawn. Only these give a banned token, or one of probability 0."""
    rows, columns = banned
    drawn = torch.zeros_like(tokens).index_add_(0, rows, (columns == tokens[rows]).long())
    return (drawn > 0) | (logprobs == -torch.inf)


def _cut_rows(logits: torch.Tensor, cuts: _Cuts, banned: Banned | None) -> torch.Tensor:
    """(R,) bool: the rows that are not drawn from the whole distribution."""
    found = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if cuts.top_k is not None:
        found |= (cuts.top_k > 0) & (cuts.top_k < logits.shape[1])
    if cuts.top_p is not None:
        found |= cuts.top_p < 1
    if cuts.log_min_p is not None:
        found |= cuts.log_min_p > -torch.inf
    if banned is not None:
        found[banned[0]] = True
    return found


def _form(
    logits: torch.Tensor, *beside: torch.Tensor | None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """What draws: tokens (R,), and their log-probs under what they were drawn from, true where `_cut_rows` is; None where
    nothing is cut. `beside`: all other tensors."""
    if native.serves("sampling", 0, logits) and native.plain(*beside):  # of rows of any width
        return _native
    return _triton if gpu.serves(logits) else _torch


def _without(logits: torch.Tensor, banned: Banned | None) -> torch.Tensor:
    return logits if banned is None else logits.index_put(banned, logits.new_tensor(-torch.inf))


# -- the native form -----------------------------------------------------------------------------------------------------


def _native(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    cuts: _Cuts,
    banned: Banned | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    took("sampling", NATIVE)
    rows, width = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    processed = torch.zeros(rows) if cuts.any or banned is not None else None
    lists = (None, None) if banned is None else _by_row(banned, rows)
    given = (keys, positions, temperature, cuts.top_k, cuts.top_p, cuts.log_min_p)
    given = [None if x is None else x.contiguous() for x in given]  # names keep them alive during the call
    run = native.function("sampling", "sample_rows")
    run(
        *map(native.address, (logits, *given, *lists, tokens, processed)),
        rows,
        width,
        logits.dtype == torch.bfloat16,
        worth(logits.numel()),
    )
    return tokens, processed


def _by_row(banned: Banned, num_rows: int) -> Banned:
    """Where each row's banned tokens begin, (R + 1,), and the tokens."""
    rows, order = banned[0].sort()
    return torch.searchsorted(rows, torch.arange(num_rows + 1)), banned[1][order]


# -- the Triton form -----------------------------------------------------------------------------------------------------


def _triton(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    cuts: _Cuts,
    banned: Banned | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    took("sampling", TRITON)
    from rlhf.kernels import sampling_triton

    allowed = _without(logits, banned)
    if not len(logits):
        return keys.new_empty(0), None
    keys, positions, temperature = keys.contiguous(), positions.contiguous(), temperature.contiguous()
    if not cuts.any and banned is None:
        return sampling_triton.draw(allowed, keys, positions, temperature, None), None
    given = (None if x is None else x.contiguous() for x in (cuts.top_k, cuts.top_p, cuts.log_min_p))
    floors, tops, log_masses = sampling_triton.cut(allowed, temperature, *given)
    tokens = sampling_triton.draw(allowed, keys, positions, temperature, floors)
    scores = allowed.gather(1, tokens[:, None])[:, 0].float() / temperature
    return tokens, scores - tops - log_masses


# -- the torch form ------------------------------------------------------------------------------------------------------


def _torch(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    cuts: _Cuts,
    banned: Banned | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    took("sampling", TORCH)
    allowed, bits = _without(logits, banned), random_bits(keys, positions)
    tokens = torch.empty_like(keys)
    processed = torch.empty_like(temperature) if cuts.any or banned is not None else None
    columns = torch.arange(logits.shape[1], device=logits.device)
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        greedy = temperature[rows] == 0
        kept = allowed[rows].float() / torch.where(greedy, 1.0, temperature[rows])[:, None]
        kept = _keep(kept, cuts.of(rows))
        noise = exponentials(token_words(bits[rows, None], columns)).log_().neg_()
        tokens[rows] = (kept + noise.masked_fill_(greedy[:, None], 0.0)).argmax(-1)
        if processed is not None:
            processed[rows] = token_logprobs(kept, tokens[rows])[0]
    return tokens, processed


def _keep(scores: torch.Tensor, cuts: _Cuts) -> torch.Tensor:
    """Scores (R, V) with everything that the cuts take away set to -inf."""
    if cuts.top_k is not None:
        scores = keep_top_k(scores, cuts.top_k)
    if cuts.top_p is not None:
        scores = keep_top_p(scores, cuts.top_p)
    if cuts.log_min_p is not None:
        scores = scores.masked_fill(scores < scores.amax(-1, True) + cuts.log_min_p[:, None], -torch.inf)
    return scores


def keep_top_k(scores: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Scores (R, V) with everything below each row's k-th largest set to -inf; rows with k = 0 or k >= V are
    kept.
    """
    vocab = scores.shape[-1]
    largest = scores.topk(min(max(int(top_k.max()), 1), vocab), -1).values
    kth = largest.gather(-1, (top_k.clamp(1, vocab) - 1)[:, None])
    return scores.masked_fill((scores < kth) & (top_k > 0)[:, None], -torch.inf)


def keep_top_p(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Scores (R, V) with everything outside each row's nucleus set to -inf; rows with p >= 1 are kept.

    The nucleus is the smallest set of likeliest tokens that together hold at least p (Holtzman et al. 2020,
    arXiv 1904.09751); it has at least one token.
    """
    top = scores.amax(-1, True)
    wanted = top_p * (scores - top).exp_().sum(-1, dtype=torch.float64)
    vocab = scores.shape[-1]
    floor, covered = _nucleus_floor(scores, wanted, min(_NUCLEUS_TOKENS, vocab))
    if not bool((covered | (top_p >= 1)).all()):
        floor, _ = _nucleus_floor(scores, wanted, vocab)
    return scores.masked_fill((scores < floor[:, None]) & (top_p < 1)[:, None], -torch.inf)


def _nucleus_floor(
    scores: torch.Tensor, wanted: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest score in each row's nucleus, looking at its `count` likeliest tokens; and whether those sufficed."""
    largest = scores.topk(count, -1).values
    mass = (largest - largest[:, :1]).exp_().cumsum(-1, dtype=torch.float64)
    inside = (mass < wanted[:, None]).sum(-1)  # tokens strictly before the one that reaches the wanted mass
    return largest.gather(-1, inside.clamp_max(count - 1)[:, None])[:, 0], inside < count
