"""Weights for tokens that the sampler drew from other weights, or from the same ones with other rounding.

w = old policy / sampler, per token, from `old_logprobs` and `rollout_logprobs`. Here: what of w multiplies the
objective. A weight has no gradient, and a weight of 0 takes a token's gradient away but leaves it in the step's
count. Not here: the ratio current / old policy, which the objective clips (`rlhf.objectives`), nor how far the two
are apart (`rlhf.mismatch`).

Every correction takes (B, T) log-probs in nats and `mask` (B, T) bool, and returns (B, T) weights: 0 outside the
mask, whatever stands there. log w, and a sequence's sum or mean of it, is kept within +-20.
"""

from __future__ import annotations

import torch

from rlhf.kl import LOG_RATIO_LIMIT, log_ratio


def none(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 on every token: sampler and old policy are taken to be the same."""
    return mask.to(old_logprobs.dtype)


def tis(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor, *, correction_cap: float
) -> torch.Tensor:
    """min(w, cap) per token: truncated importance sampling (Yao et al., "Your efficient RL framework secretly brings
    you off-policy RL training", 2025; cap 2).
    """
    return _token_weights(old_logprobs, rollout_logprobs, mask).clamp(max=correction_cap)


def decoupled(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """w per token, without a cap: the behaviour policy is the sampler, the one that the clip is taken around the old
    policy (decoupled PPO, arXiv 2110.00641; AReaL, 2505.24298).
    """
    return _token_weights(old_logprobs, rollout_logprobs, mask)


def icepop(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    correction_low: float,
    correction_high: float,
) -> torch.Tensor:
    """w where it is within [low, high], else 0, per token (IcePop, Ling team 2025; bounds .5 and 5)."""
    weights = _token_weights(old_logprobs, rollout_logprobs, mask)
    return torch.where((weights >= correction_low) & (weights <= correction_high), weights, 0.0)


def sequence_mask(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    correction_low: float,
    correction_high: float,
) -> torch.Tensor:
    """1 on every token of a sequence whose exp(mean log w) is within [low, high], else 0.

    The mean over tokens is near 1 for any small mismatch, however long the sequence: bounds that ever drop one are
    far narrower than icepop's.
    """
    log_weights = _log_weights(old_logprobs, rollout_logprobs, mask)
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = _limited(log_weights.sum(-1, keepdim=True) / counts).exp()
    return mask.to(log_weights.dtype) * ((mean >= correction_low) & (mean <= correction_high))


def sequence_tis(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor, *, correction_cap: float
) -> torch.Tensor:
    """min(w of the whole sequence, cap) on each of its tokens; that w is the product over tokens, exp(sum log w).

    The product alone makes the gradient unbiased, at a variance that grows with length.
    """
    log_weights = _log_weights(old_logprobs, rollout_logprobs, mask)
    product = _limited(log_weights.sum(-1, keepdim=True)).exp()
    return mask * product.clamp(max=correction_cap)


CORRECTIONS = {
    "none": none,
    "tis": tis,
    "decoupled": decoupled,
    "icepop": icepop,
    "sequence_mask": sequence_mask,
    "sequence_tis": sequence_tis,
}


@torch.no_grad()
def correction_sums(weights: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """`policy/correction_mean` and `policy/correction_kept_frac` (weight above 0) as sums over the tokens in `mask`:
    0-dim float64 tensors.
    """
    inside = weights[mask].double()
    return {
        "policy/correction_mean": inside.sum(),
        "policy/correction_kept_frac": (inside > 0).double().sum(),
    }


def _limited(log_weights: torch.Tensor) -> torch.Tensor:
    return log_weights.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@torch.no_grad()
def _log_weights(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    return torch.where(mask, log_ratio(old_logprobs, rollout_logprobs), 0.0)


def _token_weights(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    return mask * _log_weights(old_logprobs, rollout_logprobs, mask).exp()
