"""Estimators of KL(policy || reference) per token, from the log-probs of tokens that the policy sampled.

Here: k1, k2, k3 of Schulman, "Approximating KL divergence" (2020), with d = log policy - log reference, and the
rule that adapts a KL's weight. Not here: where they enter a loss (`rlhf.losses`) or a reward
(`rlhf.advantages`).

All take token-aligned (B, T) log-probs in nats and return the same shape. Larger always means further away.
Entries outside the caller's mask are computed like any other: mask afterwards, and feed no NaN or infinity in
there.
"""

from __future__ import annotations

import math

import torch

LOG_RATIO_LIMIT = 20.0  # d is kept within +-this before it is used: exp(20) is still finite in fp32
KL_LIMIT = 10.0  # k1 and k3 are kept within +-this, so that one token cannot outweigh a whole batch


def log_ratio(logprobs: torch.Tensor, other_logprobs: torch.Tensor) -> torch.Tensor:
    """logprobs - other_logprobs, kept within +-LOG_RATIO_LIMIT (no gradient beyond). Shapes alike, nats."""
    return (logprobs - other_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k1 = d: unbiased, high variance, may be negative. (B, T), nats, within +-10.

    The only one for a reward: on the policy's own samples E[d grad log policy] is the gradient of
    KL(policy || reference). As a loss its gradient is grad log policy, whose expectation is zero: it adds noise and
    pulls nowhere.
    """
    return log_ratio(logprobs, ref_logprobs).clamp(-KL_LIMIT, KL_LIMIT)


def kl_k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k2 = d^2 / 2: biased in value, but its gradient d * grad log policy is, on the policy's own samples,
    the gradient of the reverse KL. The right estimator for a loss, and a wrong one for a reward.
    (B, T), nats, >= 0.

    Not limited to 10 like the others: that would end its gradient at |d| = 4.5, where the pull is needed
    most.
    """
    return 0.5 * log_ratio(logprobs, ref_logprobs).square()


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 = exp(-d) - 1 + d: unbiased in value, low variance, >= 0 up to rounding. (B, T), nats, at most 10.

    As a loss (GRPO, arXiv 2402.03300 eq. 4) its gradient (1 - exp(-d)) * grad log policy is that of
    KL(reference || policy) in expectation, hence biased for the reverse KL; where the value is at its limit
    there is no gradient. Never in a reward: E[k3 grad log policy] is the gradient of KL(policy || reference) -
    KL(reference || policy), which pushes away from the reference.
    """
    d = log_ratio(logprobs, ref_logprobs)
    return (torch.expm1(-d) + d).clamp(max=KL_LIMIT)


def kl_k3_k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """The value of k3 with the gradient of k2. As a loss on the policy's own samples both are unbiased, for the
    reverse KL. (B, T), nats, at most 10.

    A reward sees the value alone, where it is as wrong as k3.
    """
    k2 = kl_k2(logprobs, ref_logprobs)
    return kl_k3(logprobs, ref_logprobs).detach() + (k2 - k2.detach())


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "k3_k2": kl_k3_k2}
LOSS_KL_ESTIMATORS = ("k2", "k3", "k3_k2")  # those whose gradient pulls towards the reference


def adaptive_kl_coef(
    coef: float, kl: float, *, kl_target: float, kl_horizon: float, num_samples: int
) -> float:
    """coef (1 + clip(kl / kl_target - 1, +-0.2) num_samples / kl_horizon): the weight that keeps the KL near its
    target (Ziegler et al., arXiv 1909.08593 section 2.2).

    kl and kl_target in the same unit, nats per response by custom; num_samples responses were seen since the last
    call. Raises ValueError for a KL that is not finite: the weight could not recover from it.
    """
    if not math.isfinite(kl):
        raise ValueError(f"kl={kl}: kl_coef={coef} cannot follow a KL that is not finite; skip the update")
    error = min(max(kl / kl_target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * num_samples / kl_horizon)
