"""Whole losses: objective + KL + entropy, aggregated, with the sums from which metrics are made.

Here: how the parts are put together, and how statistics of micro-batches and processes are added up and
named. Not here: the parts (`rlhf.objectives`, `rlhf.kl`, `rlhf.aggregate`).

A loss comes with `sums`, a dict of 0-dim float64 tensors by metric name: sums over tokens beside their
`num_tokens`, `.../loss` as shares of the step's loss, and extremes under names that end in `_min` or `_max`.
`merge_sums` adds them up, `finish_stats` makes metrics of them. All ranks give the same names in the same
order, an empty micro-batch included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from rlhf.aggregate import aggregate
from rlhf.kl import KL_ESTIMATORS, kl_k3
from rlhf.mismatch import finish_mismatch, mismatch_sums
from rlhf.objectives import OBJECTIVES, ratio_sums
from rlhf.records import Batch

Sums = dict[str, torch.Tensor]


def policy_loss(
    batch: Batch,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    *,
    objective: str,
    aggregation: str,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    constant_length: int | None,
) -> tuple[torch.Tensor, Sums]:
    """aggregate(objective + kl_coef * KL(policy || reference) - entropy_coef * entropy) over the loss mask.

    logprobs, entropy: (B, T) of the current policy with gradient, nats. The scalar is this micro-batch's
    share of the step's loss. Tokens outside the loss mask get exactly zero gradient, whatever stands there.

    Where `batch.old_logprobs` is None the current policy is the old one, as in the first update on fresh
    samples: the ratio is taken against `logprobs.detach()`, is exactly 1, and its gradient is the policy
    gradient. From the second update on the same samples on, that would silently switch the clip off: score
    the batch first. Where the sampler's log-probs are there, the mismatch with them is measured too.

    Raises ValueError for an unknown name, for the k1 estimator, or if a coefficient asks for something that
    is missing.
    """
    _check(batch, entropy, objective, kl_coef, kl_estimator, entropy_coef)
    mask = batch.loss_mask
    logprobs = _inside(mask, logprobs)
    old_logprobs = logprobs.detach() if batch.old_logprobs is None else _inside(mask, batch.old_logprobs)
    advantages = _inside(mask, batch.advantages)
    clip = {"clip_low": clip_low, "clip_high": clip_high}

    per_token = OBJECTIVES[objective](logprobs, old_logprobs, advantages, **clip)
    sums = {"num_tokens": mask.sum().double(), **ratio_sums(logprobs, old_logprobs, advantages, mask, **clip)}
    if batch.ref_logprobs is not None:
        ref_logprobs = _inside(mask, batch.ref_logprobs)
        sums["policy/kl_ref"] = kl_k3(logprobs.detach().double(), ref_logprobs.double())[mask].sum()
        if kl_coef:
            per_token = per_token + kl_coef * KL_ESTIMATORS[kl_estimator](logprobs, ref_logprobs)
    if entropy is not None:
        entropy = _inside(mask, entropy)
        sums["policy/entropy"] = entropy.detach().double().sum()
        if entropy_coef:
            per_token = per_token - entropy_coef * entropy
    if batch.rollout_logprobs is not None:
        sums |= mismatch_sums(old_logprobs, batch.rollout_logprobs, mask)

    loss = _aggregate(batch, per_token, aggregation, constant_length)
    sums["policy/loss"] = loss.detach().double()
    return loss, sums


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
    num_tokens = float(sums["num_tokens"])
    metrics: dict[str, float] = {}
    for name, value in sums.items():
        if name.endswith("/loss"):
            metrics[name] = float(value) / num_updates
        elif num_tokens and name.startswith(("policy/", "sft/")):
            metrics[name] = float(value) if reduction(name) is not torch.sum else float(value) / num_tokens
    if "policy/clip_frac_low" in metrics:
        metrics["policy/clip_frac"] = metrics["policy/clip_frac_low"] + metrics["policy/clip_frac_high"]
    if "mismatch/weight" in sums:
        metrics |= finish_mismatch(sums)
    return metrics


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


def _check(
    batch: Batch,
    entropy: torch.Tensor | None,
    objective: str,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
) -> None:
    assert batch.advantages is not None, "a policy loss needs advantages"
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}")
    if kl_coef and kl_estimator not in ("k2", "k3"):
        raise ValueError(
            f"kl_estimator {kl_estimator!r}: as a loss only k2 and k3 pull towards the reference"
        )
    if kl_coef and batch.ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs; score the batch with the reference first")
    if entropy_coef and entropy is None:
        raise ValueError(
            f"entropy_coef={entropy_coef} needs the entropy; compute log-probs with entropy=True"
        )
