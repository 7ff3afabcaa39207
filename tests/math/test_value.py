"""The critic's loss against a loop, its gradients and its metrics."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.losses import finish_stats, merge_sums
from rlhf.records import Batch
from rlhf.value import value_loss

seeds = st.integers(0, 10_000)
clips = pytest.mark.parametrize("value_clip", [None, 0.2])


def _batch(random_batch, seed: int, *, garbage: float = 0.0) -> tuple[Batch, torch.Tensor]:
    """A batch with old values and returns, and current values with gradient."""
    batch = random_batch(seed, garbage=garbage)
    noise = torch.Generator().manual_seed(seed)
    draws = torch.randn(3, *batch.token_ids.shape, generator=noise, dtype=torch.float64)
    values, returns, away = (torch.where(batch.response_mask, x, garbage) for x in draws)
    return batch.replace(values=values, returns=returns), (values + away * 0.3).requires_grad_()


def _reference(batch: Batch, values: torch.Tensor, value_clip: float | None) -> torch.Tensor:
    losses = []
    for place in batch.loss_mask.nonzero().tolist():
        v, old, target = (x[tuple(place)] for x in (values, batch.values, batch.returns))
        loss = (v - target) ** 2
        if value_clip is not None:
            loss = max(loss, (min(max(v, old - value_clip), old + value_clip) - target) ** 2)
        losses.append(loss / 2)
    return sum(losses, (values * 0).sum()) / max(len(losses), 1)


@clips
@given(seed=seeds)
def test_value_and_gradient_equal_the_loop(value_clip: float | None, seed: int, random_batch) -> None:
    """Would catch: the smaller of the two errors, a clip around the return, a missing half, a mean over all places."""
    batch, values = _batch(random_batch, seed)
    share, sums = value_loss(batch, values, value_clip=value_clip)
    want = _reference(batch, values, value_clip)
    torch.testing.assert_close(share, want)
    assert sums["value/loss"].item() == share.item() and not sums["value/loss"].requires_grad
    torch.testing.assert_close(torch.autograd.grad(share, values)[0], torch.autograd.grad(want, values)[0])


@clips
def test_gradcheck(value_clip: float | None, random_batch) -> None:
    """Would catch: a detach in the wrong place."""
    batch, values = _batch(random_batch, 3)
    assert torch.autograd.gradcheck(lambda v: value_loss(batch, v, value_clip=value_clip)[0], values)


@clips
@given(seed=seeds, cut=st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_no_cut_changes_gradient_or_statistics(value_clip, seed: int, cut: list[int], random_batch) -> None:
    """Would catch: a mean or a variance taken inside a micro-batch; an empty micro-batch that breaks."""
    batch, values = _batch(random_batch, seed)
    whole, whole_sums = value_loss(batch, values, value_clip=value_clip)
    shares, parts = [], []
    for part in range(4):
        rows = [row for row in range(5) if cut[row] == part]
        micro = batch.select(rows)
        share, sums = value_loss(micro, values[rows][:, : micro.token_ids.shape[1]], value_clip=value_clip)
        shares.append(share)
        parts.append(sums)
    total = torch.stack(shares).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, values)[0], torch.autograd.grad(whole, values)[0])
    assert finish_stats(merge_sums(parts)) == pytest.approx(finish_stats(whole_sums), rel=1e-9, abs=1e-9)


@clips
@given(seed=seeds)
def test_nothing_outside_the_loss_mask_matters(value_clip: float | None, seed: int, random_batch) -> None:
    """Would catch: mask * value, which lets NaN through, forwards or backwards."""
    clean, values = _batch(random_batch, seed)
    dirty, _ = _batch(random_batch, seed, garbage=math.nan)
    spoilt = torch.where(clean.loss_mask, values.detach(), math.nan).requires_grad_()
    want, got = (value_loss(b, v, value_clip=value_clip) for b, v in ((clean, values), (dirty, spoilt)))
    assert torch.equal(got[0], want[0])
    assert finish_stats(got[1]) == finish_stats(want[1])
    gradient = torch.autograd.grad(got[0], spoilt)[0]
    assert not gradient.isnan().any() and not gradient[~clean.loss_mask].any()


def test_metrics_by_name(random_batch) -> None:
    """Would catch: explained variance of the old values, of 1 - ratio upside down, a clip fraction of the wrong side."""
    batch, values = _batch(random_batch, 3)
    stats = finish_stats(value_loss(batch, values, value_clip=0.2)[1])
    inside = batch.loss_mask
    v, old, target = (x.detach()[inside].tolist() for x in (values, batch.values, batch.returns))
    errors = [t - x for t, x in zip(target, v)]
    stopped = [abs(x - o) > 0.2 and (x - o) * (t - x) > 0 for x, o, t in zip(v, old, target)]
    past = [abs(min(max(x, o - 0.2), o + 0.2) - t) > abs(x - t) for x, o, t in zip(v, old, target)]
    assert any(stopped) and all(p for s, p in zip(stopped, past) if s)
    assert set(stats) == {f"value/{n}" for n in ("loss", "clip_frac", "mean", "explained_variance")}
    assert stats["value/mean"] == pytest.approx(statistics.fmean(v))
    assert stats["value/clip_frac"] == pytest.approx(statistics.fmean(past))
    want = 1 - statistics.pvariance(errors) / statistics.pvariance(target)
    assert stats["value/explained_variance"] == pytest.approx(want)


def test_a_value_within_the_clip_is_not_clipped(random_batch) -> None:
    """Would catch: a share of clipped values that is the rounding of V_old + (V - V_old), and so depends on the cut."""
    batch, _ = _batch(random_batch, 3)
    values = torch.full(batch.values.shape, 1e-9)
    batch = batch.replace(values=torch.full_like(values, 0.1), returns=values)
    assert (batch.values + (values - batch.values) != values).all()
    assert finish_stats(value_loss(batch, values, value_clip=0.2)[1])["value/clip_frac"] == 0.0


def test_explained_variance_where_it_is_undefined(random_batch) -> None:
    """Would catch: 0 / 0, or noise / noise, when every return is the same; NaN hidden among the tokens."""
    batch, values = _batch(random_batch, 3)
    for constant in (0.0, 0.1, 0.3, 1.1, 7.7, 1e6 + 0.1):
        equal = batch.replace(returns=torch.full_like(batch.returns, constant))
        assert "value/explained_variance" not in finish_stats(value_loss(equal, values, value_clip=None)[1])
    empty = batch.replace(loss_mask=batch.loss_mask & False, num_loss_tokens=0, num_loss_sequences=0)
    share, sums = value_loss(empty, values, value_clip=0.2)
    assert finish_stats(sums) == {"value/loss": 0.0} and not torch.autograd.grad(share, values)[0].any()
    spoilt = torch.where(batch.loss_mask, math.nan, values.detach())
    assert math.isnan(finish_stats(value_loss(batch, spoilt, value_clip=0.2)[1])["value/explained_variance"])


def test_a_clip_without_old_values_is_refused(random_batch) -> None:
    """Would catch: a clip that silently does nothing."""
    batch, values = _batch(random_batch, 3)
    with pytest.raises(ValueError, match="value_clip=0.2 needs batch.values"):
        value_loss(batch.replace(values=None), values, value_clip=0.2)
