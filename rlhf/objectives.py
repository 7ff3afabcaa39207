"""Per-token policy objectives, as losses to be minimised.

Here: the formula of each objective, which tokens its clip has stopped, and which tokens covariance holds back. Not
here: corrections for the sampler (`rlhf.corrections`), KL, entropy and aggregation (`rlhf.losses`,
`rlhf.aggregate`), nor advantages (`rlhf.advantages`).

An objective takes token-aligned (B, T) log-probs in nats, advantages and `mask` (B, T) bool, and gives a loss per
token (B, T). Where it looks at a token alone, what lies outside the mask is computed like the rest: give finite
numbers everywhere and aggregate with the mask. r = exp(logprobs - old_logprobs), the exponent within +-20. On policy,
at r = 1, the gradient of each is -A grad logprobs: they differ in what they do once the policy has moved.
"""

from __future__ import annotations

import torch

from rlhf.kl import LOG_RATIO_LIMIT, kl_k3, log_ratio
from rlhf.rng import generator

Sides = tuple[torch.Tensor, torch.Tensor]


def importance_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """r = policy / old policy on the sampled token, exp(logprobs - old_logprobs) with the exponent within
    +-20.
    """
    return torch.exp(log_ratio(logprobs, old_logprobs))


def sequence_log_ratio(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """mean over a sequence's tokens in `mask` of log r: (B, 1), within +-20, 0 for a sequence without any."""
    inside = torch.where(mask, logprobs - old_logprobs, 0.0)
    mean = inside.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def ppo_clip(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), per token (PPO, arXiv 1707.06347 eq. 7; two bounds
    as in DAPO).

    The clip only ever stops a ratio that has already moved the way A wants: with A < 0 a large ratio is not
    clipped, with A > 0 a small one is not. `dual_clip` c adds max(., c A) where A < 0 (dual clip, arXiv 1912.09729,
    c = 3), the same as an upper bound c on the ratio there (two-sided clip, INTELLECT-2, arXiv 2505.07291);
    c > 1 + clip_high. None = no such bound.
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    gain = _clipped_gain(ratio, advantages, 1.0 - clip_low, 1.0 + clip_high)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def gspo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) on every token of a sequence, with the sequence's ratio s =
    exp(mean log r) (GSPO, arXiv 2507.18071 eq. 5 to 7; clip 3e-4 and 4e-4).

    The paper's objective is this with aggregation `sequence_mean` and one advantage per sequence; a whole sequence is
    clipped or not. The clip is two orders narrower than a token's, because s is an average.
    """
    ratio = sequence_log_ratio(logprobs, old_logprobs, mask).exp().expand_as(logprobs)
    return -_clipped_gain(ratio, advantages, 1.0 - clip_low, 1.0 + clip_high)


def gspo_token(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """gspo with s_t = sg(s) policy / sg(policy): the sequence's ratio as value, the token's own gradient, so that
    advantages may differ within a sequence (GSPO-token, arXiv 2507.18071 eq. 13 and 14).

    With one advantage per sequence and `sequence_mean` it equals gspo in value and in gradient.
    """
    log_s = sequence_log_ratio(logprobs, old_logprobs, mask).detach()
    ratio = torch.exp(log_s + (logprobs - logprobs.detach()))
    return -_clipped_gain(ratio, advantages, 1.0 - clip_low, 1.0 + clip_high)


def cispo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log policy (CISPO, MiniMax-M1, arXiv 2506.13585 eq. 4 and 5).

    The clip bounds a weight and stops no gradient. clip_low >= 1 is no lower bound, as in the paper; ScaleRL (arXiv
    2510.13786) keeps the weight within [0, 5]: clip_low 1, clip_high 4. Its value is not a surrogate of the return.
    """
    ratio = importance_ratio(logprobs, old_logprobs).detach()
    return -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages * logprobs


def gmpo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-exp(mean log q) A on every token of a sequence, q = min(r, e^clip_high) where A > 0 and max(r, e^-clip_low)
    where A < 0: the geometric mean of clipped ratios (GMPO, arXiv 2507.20673; clip .4 and .4, **in log space**).

    The paper's objective is this with aggregation `sequence_mean` and one advantage per sequence.
    """
    log_r = log_ratio(logprobs, old_logprobs)
    log_q = torch.where(advantages > 0, log_r.clamp(max=clip_high), log_r.clamp(min=-clip_low))
    log_q = torch.where(mask, log_q, 0.0)
    mean = log_q.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return -mean.exp() * advantages


def sapo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    sapo_tau_pos: float,
    sapo_tau_neg: float,
) -> torch.Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A: a soft gate instead of a clip (SAPO, arXiv 2511.20347;
    tau 1 and 1.05, aggregation `sequence_mean`).

    Its slope in r is 1 at r = 1 and falls off on both sides; a larger tau closes sooner.
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    tau = torch.where(advantages > 0, sapo_tau_pos, sapo_tau_neg).to(ratio.dtype)
    return -4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * advantages


def reinforce(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """-A log policy, without a ratio: right for one update on fresh samples (Williams, 1992)."""
    return -advantages * logprobs


OBJECTIVES = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "gmpo": gmpo,
    "sapo": sapo,
    "reinforce": reinforce,
}


def _clipped_gain(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


# -- what the clip has stopped -----------------------------------------------------------------------------------------


def _ppo_sides(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Sides:
    ratio = importance_ratio(logprobs, old_logprobs)
    low, high = _stopped(ratio, advantages, 1.0 - clip_low, 1.0 + clip_high)
    return low, high if dual_clip is None else high | ((advantages < 0) & (ratio > dual_clip))


def _gspo_sides(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Sides:
    ratio = sequence_log_ratio(logprobs, old_logprobs, mask).exp()
    return _stopped(ratio, advantages, 1.0 - clip_low, 1.0 + clip_high)


def _cispo_sides(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Sides:
    ratio = importance_ratio(logprobs, old_logprobs)
    return ratio < 1.0 - clip_low, ratio > 1.0 + clip_high


def _gmpo_sides(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Sides:
    return _stopped(log_ratio(logprobs, old_logprobs), advantages, -clip_low, clip_high)


def _no_sides(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> Sides:
    nowhere = torch.zeros_like(mask)
    return nowhere, nowhere


# By objective: (low, high), both (B, T) bool, the tokens clipped at either side. With a clip of the objective those are
# the tokens whose gradient it has stopped; with cispo, which stops none, those whose weight is at its bound.
CLIPPED_SIDES = {
    "ppo_clip": _ppo_sides,
    "gspo": _gspo_sides,
    "gspo_token": _gspo_sides,
    "cispo": _cispo_sides,
    "gmpo": _gmpo_sides,
    "sapo": _no_sides,
    "reinforce": _no_sides,
}


def _stopped(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> Sides:
    return (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high)


@torch.no_grad()
def ratio_sums(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor, sides: Sides
) -> dict[str, torch.Tensor]:
    """How far the policy has moved from the old one, over the tokens in `mask`: 0-dim float64 tensors by
    metric name.

    Sums over tokens (to be divided by their number once all micro-batches are added), except `ratio_min` and
    `ratio_max`, which are extremes: inf and -inf where the mask is empty. The ratio is each token's, whatever the
    objective makes of it; `clip_frac_low` and `clip_frac_high` count `sides`, from `CLIPPED_SIDES`. `approx_kl` is k3
    of KL(old || policy) on tokens that old sampled.
    """
    low, high = (side.expand_as(mask) & mask for side in sides)
    logprobs, old_logprobs = logprobs[mask].double(), old_logprobs[mask].double()
    ratio = importance_ratio(logprobs, old_logprobs)
    infinity = ratio.new_tensor([float("inf")])
    return {
        "policy/clip_frac_low": low.double().sum(),
        "policy/clip_frac_high": high.double().sum(),
        "policy/approx_kl": kl_k3(old_logprobs, logprobs).sum(),
        "policy/ratio_mean": ratio.sum(),
        "policy/ratio_min": torch.cat([ratio, infinity]).min(),
        "policy/ratio_max": torch.cat([ratio, -infinity]).max(),
    }


# -- covariance --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def select_by_covariance(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    covariance: str,
    cov_frac: float,
    cov_low: float,
    cov_high: float,
    key: int,
) -> torch.Tensor:
    """The tokens that lower the policy's entropy most, by c_t = (log policy - mean)(A - mean), means over `mask`:
    (B, T) bool (Clip-Cov and KL-Cov, arXiv 2505.22617). For `Batch.cov_tokens`.

    Of N tokens, max(1, floor(cov_frac N)): "clip_cov" draws them from those with cov_low < c < cov_high, as a
    function of `key`, fewer if there are not so many; "kl_cov" takes the largest c, the earlier token first where
    equal. Paper: cov_frac 2e-4, bounds 1 and 5; kl_cov 2e-3 (7B) and 2e-4 (32B). The log-probs are the policy's
    before the update, and means and ranks couple all rows: call it on the whole batch, before it is cut.
    Raises ValueError for another name.
    """
    rows, cols = mask.nonzero(as_tuple=True)
    selected = torch.zeros_like(mask)
    if not len(rows):
        return selected
    p, a = logprobs[rows, cols].double(), advantages[rows, cols].double()
    c = (p - p.mean()) * (a - a.mean())
    count = max(1, int(cov_frac * len(c)))
    if covariance == "clip_cov":
        eligible = ((c > cov_low) & (c < cov_high)).nonzero()[:, 0]
        order = generator(key, "clip_cov").permutation(len(eligible))[:count]
        chosen = eligible[torch.from_numpy(order).to(eligible.device)]
    elif covariance == "kl_cov":
        chosen = c.argsort(descending=True, stable=True)[:count]
    else:
        raise ValueError(f"covariance {covariance!r} selects no tokens; choose clip_cov or kl_cov")
    selected[rows[chosen], cols[chosen]] = True
    return selected
