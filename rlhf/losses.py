"""Whole losses: correction * objective + KL + entropy, aggregated, with the sums from which metrics are made.

Here: how the parts are put together, and how statistics of micro-batches and processes are added up and
named. Not here: the parts (`rlhf.objectives`, `rlhf.corrections`, `rlhf.kl`, `rlhf.aggregate`).

A loss comes with `sums`, a dict of 0-dim float64 tensors by metric name: sums over tokens beside their
`num_tokens`, `.../loss` as shares of the step's loss, and extremes under names that end in `_min` or `_max`.
`merge_sums` adds them up, `finish_stats` makes metrics of them. All ranks give the same names in the same
order, an empty micro-batch included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlhf.aggregate import aggregate
from rlhf.corrections import CORRECTIONS, correction_sums
from rlhf.kl import KL_ESTIMATORS, LOSS_KL_ESTIMATORS, kl_k3
from rlhf.kto import KTO_COUNTS
from rlhf.mismatch import finish_mismatch, mismatch_sums
from rlhf.objectives import CLIPPED_SIDES, OBJECTIVES, ratio_sums
from rlhf.records import Batch
from rlhf.settings import bind
from rlhf.value import finish_value

Sums = dict[str, torch.Tensor]


# What a metric's sum is divided by, from its first part; names with another first part make no metric of their own.
COUNTS = {
    "policy": "num_tokens",
    "value": "num_tokens",
    "sft": "num_tokens",
    "ptx": "num_ptx_tokens",
    "distill": "num_tokens",
    "prm": "num_tokens",
    "dpo": "num_pairs",
    "rm": "num_pairs",
    "kto": "num_sequences",
}


def policy_loss(
    batch: Batch,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    settings: Any,
    *,
    constant_length: int | None,
) -> tuple[torch.Tensor, Sums]:
    """aggregate(correction * objective + kl_coef * KL(policy || reference) - entropy_coef * entropy) over the loss
    mask, plus positive_nll_coef * NLL of right answers.

    logprobs, entropy: (B, T) of the current policy with gradient, nats. `settings` is a recipe's algorithm section,
    with `kl_in_reward` and `kl_estimator` decided: a KL in the reward is not in the loss again. The scalar is this
    micro-batch's share of the step's loss. Tokens outside the loss mask get exactly zero gradient, whatever stands
    there.

    Where `batch.old_logprobs` is None the current policy is the old one, as in the first update on fresh
    samples: the ratio is taken against `logprobs.detach()`, is exactly 1, and its gradient is the policy
    gradient. From the second update on the same samples on, that would silently switch the clip off: score
    the batch first. Where the sampler's log-probs are there, the mismatch with them is measured too.

    Raises ValueError for an unknown name, for the k1 estimator, or if a coefficient asks for something that
    is missing.
    """
    _check(batch, entropy, settings)
    mask = batch.loss_mask
    logprobs = _inside(mask, logprobs)
    old_logprobs = logprobs.detach() if batch.old_logprobs is None else _inside(mask, batch.old_logprobs)
    per_token, sums = _objective(batch, logprobs, old_logprobs, settings)
    if batch.ref_logprobs is not None:
        ref_logprobs = _inside(mask, batch.ref_logprobs)
        sums["policy/kl_ref"] = kl_k3(logprobs.detach().double(), ref_logprobs.double())[mask].sum()
        if settings.kl_coef and not settings.kl_in_reward:
            per_token = per_token + settings.kl_coef * KL_ESTIMATORS[settings.kl_estimator](
                logprobs, ref_logprobs
            )
    if entropy is not None:
        entropy = _inside(mask, entropy)
        sums["policy/entropy"] = entropy.detach().double().sum()
        if settings.entropy_coef:
            per_token = per_token - settings.entropy_coef * entropy
    if batch.rollout_logprobs is not None:
        sums |= mismatch_sums(old_logprobs, batch.rollout_logprobs, mask)

    loss = _aggregate(batch, per_token, settings.aggregation, constant_length)
    if settings.positive_nll_coef:
        loss = loss + settings.positive_nll_coef * _positive_nll(batch, logprobs)
    sums["policy/loss"] = loss.detach().double()
    return loss, sums


def _objective(
    batch: Batch, logprobs: torch.Tensor, old_logprobs: torch.Tensor, settings: Any
) -> tuple[torch.Tensor, Sums]:
    """Objective times correction per token, tokens held back for their covariance included, and their sums."""
    mask, advantages = batch.loss_mask, _inside(batch.loss_mask, batch.advantages)
    held = None if settings.covariance == "none" else batch.cov_tokens & mask
    arguments = (logprobs, old_logprobs, advantages, mask)
    with torch.no_grad():
        sides = bind(CLIPPED_SIDES[settings.objective], settings)(*arguments)
    sums = {"num_tokens": mask.sum().double(), **ratio_sums(logprobs, old_logprobs, mask, sides)}

    if settings.covariance == "clip_cov":  # those tokens stay in the value, but have no gradient
        arguments = (torch.where(held, logprobs.detach(), logprobs), *arguments[1:])
    per_token = bind(OBJECTIVES[settings.objective], settings)(*arguments)
    if settings.correction != "none":
        rollout_logprobs = _inside(mask, batch.rollout_logprobs)
        weights = bind(CORRECTIONS[settings.correction], settings)(old_logprobs, rollout_logprobs, mask)
        per_token = weights * per_token
        sums |= correction_sums(weights, mask)
    if (
        settings.covariance == "kl_cov"
    ):  # k3 the other way round: KL(old || policy), on tokens that old sampled
        per_token = per_token + settings.kl_cov_coef * _inside(held, kl_k3(old_logprobs, logprobs))
    if held is not None:
        sums["policy/cov_frac"] = held.sum().double()
    return per_token, sums


def _positive_nll(batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
    """-sum of log-probs of right answers / number of their loss tokens in the step, as this micro-batch's share (VAPO's
    positive-example loss, arXiv 2504.05118; coefficient .1). The policy is that of the ratio, at the sampling
    temperature.
    """
    assert batch.right is not None, (
        "the NLL of right answers needs to know which are: set correct_above in make_batch"
    )
    positive = batch.loss_mask & batch.right[:, None]
    assert batch.num_positive_tokens or not positive.any(), (
        "num_positive_tokens is stale: recount the step's batch"
    )
    return -_inside(positive, logprobs).sum() / max(batch.num_positive_tokens, 1)


def sft_loss(batch: Batch, logprobs: torch.Tensor) -> tuple[torch.Tensor, Sums]:
    """-sum of logprobs (B, T) / number of loss tokens in the step, as this micro-batch's share."""
    loss = _aggregate(batch, -logprobs, "token_mean", None)
    return loss, {"num_tokens": batch.loss_mask.sum().double(), "sft/loss": loss.detach().double()}


def merge_sums(parts: Sequence[Mapping[str, torch.Tensor]]) -> Sums:
    """The sums of several micro-batches, processes or updates as one: each name by its `reduction`."""
    assert parts and all(part.keys() == parts[0].keys() for part in parts), (
        "sums of different losses do not add up"
    )
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: reduction(name)(values) for name, values in stacked.items()}


def reduction(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """How the sums of this name combine: torch.amin, torch.amax or torch.sum."""
    return torch.amin if name.endswith("_min") else torch.amax if name.endswith("_max") else torch.sum


def finish_stats(sums: Mapping[str, torch.Tensor | float], *, num_updates: int = 1) -> dict[str, float]:
    """Metrics by name from merged sums: means over tokens, extremes, and the loss as a mean over updates.

    `policy/clip_frac` is the sum of its two sides. Without a single token only the loss (0) is left: a mean
    over nothing is left out, not NaN. A NaN among the tokens stays NaN.
    """
    metrics: dict[str, float] = {}
    for name, value in sums.items():
        count = float(sums.get(_count_of(name), 0.0))
        if name.endswith("/loss"):
            metrics[name] = float(value) / num_updates
        elif count:
            metrics[name] = float(value) if reduction(name) is not torch.sum else float(value) / count
    if "policy/clip_frac_low" in metrics:
        metrics["policy/clip_frac"] = metrics["policy/clip_frac_low"] + metrics["policy/clip_frac_high"]
    if "mismatch/weight" in sums:
        metrics |= finish_mismatch(sums)
    if "critic_fit/error" in sums:
        metrics |= finish_value(sums)
    return metrics


def _count_of(name: str) -> str:
    """The name of the count that a sum is divided by."""
    return KTO_COUNTS.get(name) or COUNTS.get(name.partition("/")[0], "")


def _inside(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """0 outside the mask, so that nothing there reaches a formula, nor its gradient comes back."""
    return torch.where(mask, values, 0.0)


def _aggregate(batch: Batch, per_token: torch.Tensor, how: str, constant_length: int | None) -> torch.Tensor:
    return aggregate(
        per_token,
        batch.loss_mask,
        how=how,
        num_loss_tokens=batch.num_loss_tokens,
        num_loss_sequences=batch.num_loss_sequences,
        constant_length=constant_length,
    )


def _check(batch: Batch, entropy: torch.Tensor | None, settings: Any) -> None:
    assert batch.advantages is not None, "a policy loss needs advantages"
    assert settings.kl_in_reward is not None, "kl_in_reward is undecided; resolve the method's default first"
    for kind, table in (("objective", OBJECTIVES), ("correction", CORRECTIONS)):
        name = getattr(settings, kind)
        if name not in table:
            raise ValueError(f"{kind} {name!r} is unknown; choose one of {', '.join(table)}")
    if settings.kl_coef and not settings.kl_in_reward:
        if settings.kl_estimator not in LOSS_KL_ESTIMATORS:
            raise ValueError(
                f"kl_estimator {settings.kl_estimator!r}: as a loss only {', '.join(LOSS_KL_ESTIMATORS)} pull towards "
                "the reference"
            )
        if batch.ref_logprobs is None:
            raise ValueError(
                f"kl_coef={settings.kl_coef} needs ref_logprobs; score the batch with the reference first"
            )
    if settings.entropy_coef and entropy is None:
        raise ValueError(
            f"entropy_coef={settings.entropy_coef} needs the entropy; compute log-probs with entropy=True"
        )
    if settings.correction != "none" and batch.rollout_logprobs is None:
        raise ValueError(
            f"correction {settings.correction!r} needs rollout_logprobs, which the sampler reports; use correction: none"
        )
    if settings.covariance != "none" and batch.cov_tokens is None:
        raise ValueError(
            f"covariance {settings.covariance!r} needs cov_tokens; select them on the whole batch before it is cut"
        )
