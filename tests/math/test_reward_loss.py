"""Losses of scalar heads against float64 references, and the interval of an accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf.batching import recount
from rlhf.records import Batch
from rlhf.reward_loss import accuracy_interval, bradley_terry, prm_loss

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def _pairs(random_batch: Callable[..., Batch], seed: int, *, pairs: int = 4) -> Batch:
    batch = random_batch(seed, rows=2 * pairs, group_size=2)
    whole = batch.response_mask.any(-1).view(pairs, 2).all(-1).repeat_interleave(2)
    margins = torch.rand(pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return recount(
        batch.replace(
            labels=torch.tensor([1.0, -1.0] * pairs),
            margins=margins.repeat_interleave(2),
            loss_mask=batch.response_mask & whole[:, None],
        )
    )


def _scores(*shape: int, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=noise, dtype=torch.float64).requires_grad_()


def _bt_reference(batch: Batch, scores: torch.Tensor, coef: float, *, with_margin: bool):
    losses = []
    for w in range(0, len(batch), 2):
        if not batch.loss_mask[w].any():
            continue
        r_w, r_l = scores[w], scores[w + 1]
        margin = float(batch.margins[w]) if with_margin else 0.0
        losses.append((1 + (-(r_w - r_l - margin)).exp()).log() + coef * (r_w + r_l) ** 2)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("with_margin", [True, False])
@given(seed=st.integers(0, 10_000))
def test_bradley_terry_equals_the_papers(with_margin: bool, seed: int, random_batch) -> None:
    """Would catch: a margin added instead of subtracted, centring of the difference, empty pairs counted."""
    batch = _pairs(random_batch, seed)
    assume(batch.num_loss_sequences)
    scores = _scores(len(batch), seed=seed)
    want = _bt_reference(batch, scores, 0.05, with_margin=with_margin)
    got, sums = bradley_terry(scores, batch if with_margin else batch.replace(margins=None), center_coef=0.05)
    torch.testing.assert_close(got, want.detach(), **CLOSE)
    (gradient,) = torch.autograd.grad(got, scores)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, scores)[0], **CLOSE)
    counted = [w for w in range(0, len(batch), 2) if batch.loss_mask[w].any()]
    assert sums["num_pairs"] == len(counted) == batch.num_loss_sequences / 2
    assert sums["rm/accuracy"] == sum(float(scores[w] > scores[w + 1]) for w in counted)
    assert sums["rm/margin"].item() == pytest.approx(sum((scores[w] - scores[w + 1]).item() for w in counted))
    assert sums["rm/margin"].item() == pytest.approx(
        (sums["rm/reward_chosen"] - sums["rm/reward_rejected"]).item()
    )


@given(seed=st.integers(0, 10_000), cut=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_no_cut_by_pairs_changes_the_reward_models_gradient(seed: int, cut: list[int], random_batch) -> None:
    """Would catch: a mean inside a micro-batch, an empty one that breaks."""
    batch = _pairs(random_batch, seed)
    scores = _scores(len(batch), seed=seed)
    whole, whole_sums = bradley_terry(scores, batch, center_coef=0.05)
    (want,) = torch.autograd.grad(whole, scores)
    shares, parts = [], []
    for part in range(3):
        rows = [r for r in range(len(batch)) if cut[r // 2] == part]
        share, sums = bradley_terry(scores[rows], batch.select(rows), center_coef=0.05)
        shares.append(share)
        parts.append(sums)
    total = torch.stack(shares).sum()
    torch.testing.assert_close(total, whole, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(total, scores)[0], want, **CLOSE)
    for key, value in whole_sums.items():
        torch.testing.assert_close(sum(sums[key] for sums in parts), value, **CLOSE)


def test_a_constant_scorer_is_right_half_of_the_time(random_batch) -> None:
    """Would catch: ties counted as all right or all wrong."""
    batch = _pairs(random_batch, 3)
    loss, sums = bradley_terry(torch.ones(len(batch)), batch.replace(margins=None), center_coef=0.0)
    assert loss.item() == pytest.approx(math.log(2)) and sums["rm/accuracy"] == sums["num_pairs"] / 2


def _steps(random_batch: Callable[..., Batch], seed: int) -> Batch:
    batch = random_batch(seed)
    labels = torch.rand(batch.token_ids.shape, generator=torch.Generator().manual_seed(seed))
    labels = torch.where(batch.loss_mask, labels.double().round(decimals=1), math.nan)
    return batch.replace(token_labels=labels)


@given(seed=st.integers(0, 10_000))
def test_prm_loss_is_the_cross_entropy_at_the_steps(seed: int, random_batch) -> None:
    """Would catch: NaN labels in the loss or its gradient, a mean per row, soft labels made hard."""
    batch = _steps(random_batch, seed)
    assume(batch.num_loss_tokens)
    scores = _scores(*batch.token_ids.shape, seed=seed)
    places = batch.loss_mask.nonzero().tolist()
    losses, right = [], 0
    for b, t in places:
        p, y = 1 / (1 + (-scores[b, t]).exp()), float(batch.token_labels[b, t])
        losses.append(-y * p.log() - (1 - y) * (1 - p).log())
        right += (p.item() > 0.5) == (y > 0.5)
    want = sum(losses) / len(losses)
    got, sums = prm_loss(scores, batch)
    torch.testing.assert_close(got, want.detach(), **CLOSE)
    (gradient,) = torch.autograd.grad(got, scores)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, scores)[0], **CLOSE)
    assert sums["prm/accuracy"] == right and sums["num_tokens"] == len(places)
    assert sums["prm/label_mean"].item() == pytest.approx(
        sum(float(batch.token_labels[b, t]) for b, t in places)
    )


@given(seed=st.integers(0, 10_000), cut=st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_no_cut_changes_the_prms_gradient(seed: int, cut: list[int], random_batch) -> None:
    """Would catch: a mean over the steps of a micro-batch."""
    batch = _steps(random_batch, seed)
    scores = _scores(*batch.token_ids.shape, seed=seed)
    whole, _ = prm_loss(scores, batch)
    shares = []
    for part in range(3):
        rows = [row for row in range(5) if cut[row] == part]
        micro = batch.select(rows)
        shares.append(prm_loss(scores[rows][:, : micro.token_ids.shape[1]], micro)[0])
    total = torch.stack(shares).sum()
    torch.testing.assert_close(total, whole, **CLOSE)
    (want,) = torch.autograd.grad(whole, scores)
    torch.testing.assert_close(torch.autograd.grad(total, scores)[0], want, **CLOSE)


def test_a_step_without_label_is_refused(random_batch) -> None:
    """Would catch: NaN for a loss because the mask and the labels disagree."""
    batch = _steps(random_batch, 3)
    missing = batch.replace(token_labels=torch.full_like(batch.token_labels, math.nan))
    with pytest.raises(ValueError, match="label is missing or not between 0 and 1"):
        prm_loss(_scores(*batch.token_ids.shape, seed=0), missing)


def test_an_empty_share_runs_backward(random_batch) -> None:
    """Would catch: a micro-batch without rows that has no graph, or gives NaN."""
    batch = _steps(random_batch, 3).select([])
    scores = _scores(*batch.token_ids.shape, seed=0)
    loss, sums = prm_loss(scores, batch)
    torch.autograd.grad(loss, scores)
    assert loss == 0 and sums["num_tokens"] == 0


def test_wilson_interval() -> None:
    """Would catch: the normal approximation, which gives [1, 1] for 10 of 10."""
    low, high = accuracy_interval(81, 263)  # Newcombe, Statistics in Medicine 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = accuracy_interval(15, 148)
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
    low, high = accuracy_interval(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and round(high, 4) == 0.1611
    low, high = accuracy_interval(1, 29)
    assert (round(low, 4), round(high, 4)) == (0.0061, 0.1718)
    for correct, total in ((0, 0), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match=f"{correct} correct of {total}"):
            accuracy_interval(correct, total)
