"""A step's numbers, from its records: names and meanings are those of docs/metrics.md.

Only numbers that are a function of the recipe are made here; times and rates are the clock's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf.losses import finish_stats, merge_sums
from rlhf.records import Rollout
from rlhf.trainers.deepspeed_engine import UpdateStats


def update_metrics(updates: Sequence[UpdateStats], *, role: str = "policy") -> dict[str, float]:
    """Means over the step's updates, weighted by what they count; gradient norm and learning rate of the last.

    Updates without a token in the loss have no numbers and are left out; where all were, only norm (0) and rate remain.
    {} for no update at all. `role` is "policy", or "value" for the critic's.
    """
    if not updates:
        return {}
    sums = [u.sums for u in updates if not u.empty]
    metrics = finish_stats(merge_sums(sums), num_updates=len(sums)) if sums else {}
    last = updates[-1]
    return metrics | {f"{role}/grad_norm": last.grad_norm, f"{role}/lr": last.lr}


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths and ways of ending."""
    lengths = np.array([len(r.response_ids) for r in rollouts])
    return {
        "rollout/response_tokens_mean": float(lengths.mean()),
        "rollout/response_tokens_p50": float(np.percentile(lengths, 50)),
        "rollout/response_tokens_p95": float(np.percentile(lengths, 95)),
        "rollout/response_tokens_max": float(lengths.max()),
        "rollout/truncated_frac": float(np.mean([r.finish_reason == "length" for r in rollouts])),
        "rollout/aborted_frac": float(np.mean([r.finish_reason == "aborted" for r in rollouts])),
        "rollout/empty_frac": float(np.mean([not r.response_text.strip() for r in rollouts])),
    }


def staleness_metrics(rollouts: Sequence[Rollout], *, version: int) -> dict[str, float]:
    """How many optimiser steps old the samples were when the update on them began."""
    lags = [version - v for r in rollouts for v in r.policy_versions] or [0]
    return {"staleness/mean": float(np.mean(lags)), "staleness/max": float(np.max(lags))}
