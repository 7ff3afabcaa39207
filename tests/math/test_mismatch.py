"""Trainer against sampler: the metrics against a loop, and their sums over micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.losses import merge_sums
from rlhf.mismatch import finish_mismatch, mismatch_sums


@given(seed=st.integers(0, 10_000))
def test_equal_to_the_loop_and_add_up(seed: int, random_batch) -> None:
    """Would catch: KL the other way round, tokens outside the mask, an ESS averaged over micro-batches."""
    batch = random_batch(seed, garbage=math.nan)
    args = batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask
    pairs = [(o, r) for o, r, m in zip(*(x.flatten().tolist() for x in args)) if m]
    got = finish_mismatch(mismatch_sums(*args))
    if not pairs:
        assert got == {}
        return
    w = [math.exp(o - r) for o, r in pairs]
    want = {
        "mismatch/logprob_abs_mean": sum(abs(o - r) for o, r in pairs) / len(pairs),
        "mismatch/logprob_abs_max": max(abs(o - r) for o, r in pairs),
        "mismatch/kl": sum(x - 1 - math.log(x) for x in w) / len(w),
        "mismatch/outside_frac": sum(not 0.5 <= x <= 2 for x in w) / len(w),
        "mismatch/ess": sum(w) ** 2 / sum(x * x for x in w) / len(w),
    }
    assert got == pytest.approx(want, rel=1e-9, abs=1e-12)
    parts = [mismatch_sums(*(x[rows] for x in args)) for rows in ([0, 1], [], [2], [3, 4])]
    assert finish_mismatch(merge_sums(parts)) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_equal_logprobs_give_exactly_zero() -> None:
    """Would catch: noise that would hide the first real mismatch in deterministic mode."""
    logprobs = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    metrics = finish_mismatch(mismatch_sums(logprobs, logprobs.clone(), everywhere))
    assert metrics == {
        "mismatch/logprob_abs_mean": 0,
        "mismatch/logprob_abs_max": 0,
        "mismatch/kl": 0,
        "mismatch/outside_frac": 0,
        "mismatch/ess": 1,
    }
    assert finish_mismatch(mismatch_sums(logprobs, logprobs, ~everywhere)) == {}
