"""The weights for the sampler's mismatch against loops, and what must not change them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.corrections import CORRECTIONS, correction_sums
from rlhf.losses import merge_sums
from rlhf.settings import bind

SETTINGS = SimpleNamespace(correction_cap=1.3, correction_low=0.7, correction_high=1.5)
names = pytest.mark.parametrize("name", CORRECTIONS)
seeds = st.integers(0, 10_000)


def _loop(name: str, logs: list[float]) -> list[float]:
    """The weights of one sequence's tokens from their log w, from the papers."""
    weights = [math.exp(x) for x in logs]
    if name == "none":
        return [1.0] * len(logs)
    if name == "tis":
        return [min(w, 1.3) for w in weights]
    if name == "decoupled":
        return weights
    if name == "icepop":
        return [w if 0.7 <= w <= 1.5 else 0.0 for w in weights]
    if name == "sequence_tis":
        return [min(math.prod(weights), 1.3)] * len(logs)
    geometric = math.prod(weights) ** (1 / len(weights))
    return [1.0 if 0.7 <= geometric <= 1.5 else 0.0] * len(logs)


def _weights(name: str, batch) -> torch.Tensor:
    return bind(CORRECTIONS[name], SETTINGS)(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask)


@names
@given(seed=seeds)
def test_equal_to_the_loop(name: str, seed: int, random_batch) -> None:
    """Would catch: sampler / old for old / sampler, a cap that drops, bounds that cap, sum and mean of a sequence
    swapped, tokens outside the mask in them, NaN from there.
    """
    batch = random_batch(seed, garbage=math.nan)
    got = _weights(name, batch)
    for b in range(len(batch)):
        inside = batch.loss_mask[b]
        logs = (batch.old_logprobs[b] - batch.rollout_logprobs[b])[inside].tolist()
        want = torch.tensor(_loop(name, logs) if logs else [], dtype=torch.float64)
        torch.testing.assert_close(got[b, inside], want)
        assert not got[b, ~inside].any()


@names
def test_weights_have_no_gradient(name: str, random_batch) -> None:
    """Would catch: a loss that lowers itself by moving the weight of the first update, where old is the policy."""
    batch = random_batch(3)
    assert not _weights(name, batch.replace(old_logprobs=batch.old_logprobs.requires_grad_())).requires_grad


@names
def test_equal_logprobs_give_exactly_one(name: str, random_batch) -> None:
    """Would catch: a weight off by rounding, which would part a corrected curve from the plain one in deterministic
    mode.
    """
    batch = random_batch(3)
    logprobs = batch.old_logprobs.float()
    batch = batch.replace(old_logprobs=logprobs, rollout_logprobs=logprobs.clone())
    assert torch.equal(_weights(name, batch), batch.loss_mask.float())


@names
def test_extreme_logprobs_stay_finite(name: str, random_batch) -> None:
    """Would catch: inf from the exponential of a sum over a long sequence."""
    batch = random_batch(3)
    far = batch.replace(
        old_logprobs=batch.old_logprobs.float() * 0, rollout_logprobs=batch.old_logprobs.float() * 0 - 90
    )
    assert _weights(name, far).isfinite().all()
    assert (
        _weights(name, far.replace(old_logprobs=far.rollout_logprobs, rollout_logprobs=far.old_logprobs))
        .isfinite()
        .all()
    )


@given(seed=seeds)
def test_sums_equal_the_loop_and_add_up(seed: int, random_batch) -> None:
    """Would catch: a share taken per micro-batch, tokens outside the mask counted as dropped."""
    batch = random_batch(seed)
    weights = _weights("icepop", batch)
    inside = weights[batch.loss_mask].tolist()
    want = {
        "policy/correction_mean": sum(inside),
        "policy/correction_kept_frac": sum(w > 0 for w in inside),
    }
    parts = [correction_sums(weights[rows], batch.loss_mask[rows]) for rows in ([0, 3], [], [1, 2, 4])]
    assert {n: v.item() for n, v in merge_sums(parts).items()} == pytest.approx(want)
