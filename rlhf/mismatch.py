"""How far the trainer's log-probs are from the sampler's on the same tokens.

Both come from the same weights, so every difference is numerical, or a bug: stale weights, another
temperature, a mask. In deterministic mode all of it is exactly 0. Not here: corrections of the loss for it
(`rlhf.corrections`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlhf.kl import kl_k3, log_ratio

USUAL_WEIGHTS = (0.5, 2.0)  # old / rollout of a token; what rounding alone hardly ever leaves


@torch.no_grad()
def mismatch_sums(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums over the tokens in `mask` (B, T), to be added over micro-batches and processes: 0-dim float64
    tensors.

    With w = old / rollout, per token: |log w|, k3 of KL(rollout || old), w outside `USUAL_WEIGHTS`, w and w^2;
    `..._max` is an extreme, and -inf where the mask is empty. `num_tokens` comes with them.
    """
    old, rollout = old_logprobs[mask].double(), rollout_logprobs[mask].double()
    distance = (old - rollout).abs()
    weight = log_ratio(old, rollout).exp()
    return {
        "num_tokens": mask.sum().double(),
        "mismatch/logprob_abs_mean": distance.sum(),
        "mismatch/logprob_abs_max": torch.cat([distance, distance.new_tensor([-float("inf")])]).max(),
        "mismatch/kl": kl_k3(rollout, old).sum(),
        "mismatch/outside_frac": ((weight < USUAL_WEIGHTS[0]) | (weight > USUAL_WEIGHTS[1])).double().sum(),
        "mismatch/weight": weight.sum(),
        "mismatch/weight_squared": weight.square().sum(),
    }


def finish_mismatch(sums: Mapping[str, torch.Tensor | float]) -> dict[str, float]:
    """`mismatch/{logprob_abs_mean,logprob_abs_max,kl,outside_frac,ess}` from added-up sums; {} if they cover no token.

    ess is the effective share of the tokens, (sum w)^2 / (n sum w^2): 1 if all weights are equal, 1 / n at
    worst.
    """
    num_tokens = float(sums["num_tokens"])
    if num_tokens == 0:
        return {}
    weight, weight_squared = float(sums["mismatch/weight"]), float(sums["mismatch/weight_squared"])
    return {
        "mismatch/logprob_abs_mean": float(sums["mismatch/logprob_abs_mean"]) / num_tokens,
        "mismatch/logprob_abs_max": float(sums["mismatch/logprob_abs_max"]),
        "mismatch/kl": float(sums["mismatch/kl"]) / num_tokens,
        "mismatch/outside_frac": float(sums["mismatch/outside_frac"]) / num_tokens,
        "mismatch/ess": weight**2 / (num_tokens * weight_squared),
    }
