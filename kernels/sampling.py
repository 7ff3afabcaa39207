"""Sampling one token per row from logits: temperature, top-k, top-p, banned tokens, and the log-probs of the
choice.

Here: pure functions of tensors. Every reduction runs along a row, so a row's token and log-probs depend on
that row alone, never on what else is in the batch. Not here: stop detection and per-request parameters
(`rlhf.rollout`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.kernels.logprob import token_logprobs

_NUCLEUS_TOKENS = 1024  # likeliest tokens looked at before a nucleus needs the whole vocabulary sorted


@dataclass(frozen=True)
class Sampled:
    """One token per row, R rows."""

    tokens: torch.Tensor  # (R,) int64
    logprobs: torch.Tensor  # (R,) fp32, nats: log softmax(logits / T)[token]; T = 1 for greedy rows
    processed_logprobs: torch.Tensor  # (R,) fp32, nats: under the distribution drawn from; 0 for greedy rows


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    banned: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Sampled:
    """Draw one token per row by inverting the cumulative distribution at `uniforms`.

    logits (R, V) any float dtype; uniforms (R,) float64 in [0, 1); temperature (R,) fp32, 0 = greedy; top_k
    (R,) int64, 0 = all; top_p (R,) float64, 1 = all; None = no row uses it. banned: (rows, columns) that must
    not be drawn; they count in `logprobs` and not in `processed_logprobs`. Order: temperature, ban, top-k,
    top-p of what top-k left. Equal scores at a cut are all kept. A row with non-finite logits yields a valid
    token id with a NaN log-prob.
    """
    greedy = temperature == 0
    policy = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    scores = policy
    if banned is not None:
        scores = scores.index_put(banned, scores.new_tensor(-torch.inf))
    kept = scores
    if top_k is not None:
        kept = keep_top_k(kept, top_k)
    if top_p is not None:
        kept = keep_top_p(kept, top_p)
    tokens = _draw(torch.softmax(kept, -1), uniforms)
    if greedy.any():
        tokens = torch.where(greedy, scores.argmax(-1), tokens)
    logprobs, _ = token_logprobs(policy, tokens)
    processed = logprobs if kept is policy else token_logprobs(kept, tokens)[0]
    return Sampled(tokens, logprobs, torch.where(greedy, 0.0, processed))


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
    probs = torch.softmax(scores, -1)
    wanted = top_p * probs.cumsum(-1, dtype=torch.float64)[:, -1]
    vocab = scores.shape[-1]
    floor, covered = _nucleus_floor(probs, wanted, min(_NUCLEUS_TOKENS, vocab))
    if not bool((covered | (top_p >= 1)).all()):
        floor, _ = _nucleus_floor(probs, wanted, vocab)
    return scores.masked_fill((probs < floor[:, None]) & (top_p < 1)[:, None], -torch.inf)


def _nucleus_floor(
    probs: torch.Tensor, wanted: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest probability in each row's nucleus, looking at its `count` likeliest; and whether those
    sufficed.
    """
    largest = probs.topk(count, -1).values
    mass = largest.cumsum(-1, dtype=torch.float64)
    inside = (mass < wanted[:, None]).sum(-1)  # tokens strictly before the one that reaches the wanted mass
    return largest.gather(-1, inside.clamp_max(count - 1)[:, None])[:, 0], inside < count


def _draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """First token whose cumulative probability exceeds uniform * total: never one of probability zero. (R,)
    int64.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    points = uniforms * cumulative[:, -1]
    return torch.searchsorted(cumulative, points[:, None], right=True)[:, 0].clamp_max(probs.shape[-1] - 1)
