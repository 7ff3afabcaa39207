"""Per-token policy objectives, as losses to be minimised.

Here: the formula of each objective and the sums that say how often it clipped. Not here: KL, entropy and
aggregation (`rlhf.losses`, `rlhf.aggregate`), nor advantages (`rlhf.advantages`).

All arrays are token-aligned (B, T). Nothing is masked here: give finite numbers everywhere and aggregate with
the mask.
"""

from __future__ import annotations

import torch

from rlhf.kl import kl_k3, log_ratio


def importance_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """r = policy / old policy on the sampled token, exp(logprobs - old_logprobs) with the exponent within
    +-20.
    """
    return torch.exp(log_ratio(logprobs, old_logprobs))


def ppo_clip(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), per token (PPO, arXiv 1707.06347 eq. 7; two bounds
    as in DAPO).

    The clip only ever stops a ratio that has already moved the way A wants: with A < 0 a large ratio is not
    clipped, with A > 0 a small one is not. Gradient at r = 1 is -A * grad logprobs.
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


OBJECTIVES = {"ppo_clip": ppo_clip}


@torch.no_grad()
def ratio_sums(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> dict[str, torch.Tensor]:
    """How far the policy has moved from the old one, over the tokens in `mask`: 0-dim float64 tensors by
    metric name.

    Sums over tokens (to be divided by their number once all micro-batches are added), except `ratio_min` and
    `ratio_max`, which are extremes: inf and -inf where the mask is empty. `clip_frac_low` counts A < 0 with r
    < 1 - clip_low, `clip_frac_high` A > 0 with r > 1 + clip_high: the tokens whose gradient the clip has
    stopped. `approx_kl` is k3 of KL(old || policy) on tokens that old sampled.
    """
    logprobs, old_logprobs, advantages = (x[mask].double() for x in (logprobs, old_logprobs, advantages))
    ratio = importance_ratio(logprobs, old_logprobs)
    infinity = ratio.new_tensor([float("inf")])
    return {
        "policy/clip_frac_low": ((advantages < 0) & (ratio < 1.0 - clip_low)).double().sum(),
        "policy/clip_frac_high": ((advantages > 0) & (ratio > 1.0 + clip_high)).double().sum(),
        "policy/approx_kl": kl_k3(old_logprobs, logprobs).sum(),
        "policy/ratio_mean": ratio.sum(),
        "policy/ratio_min": torch.cat([ratio, infinity]).min(),
        "policy/ratio_max": torch.cat([ratio, -infinity]).max(),
    }
