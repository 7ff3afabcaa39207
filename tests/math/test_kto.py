"""Losses on labelled responses against float64 references, their baselines, and the mismatched batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf.batching import SftExample, make_sft_batch
from rlhf.kto import (
    KTO_COUNTS,
    LABEL_LOSSES,
    kto_baseline,
    kto_loss,
    mismatched,
    with_bco_baseline,
    with_kto_baseline,
)
from rlhf.records import Batch

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
SETTINGS = {"beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.6}


def _labelled(random_batch: Callable[..., Batch], seed: int) -> Batch:
    batch = random_batch(seed, rows=6)
    dice = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (6,), generator=dice) * 2.0 - 1
    return batch.replace(labels=labels, baselines=torch.full((6,), 0.4, dtype=torch.float64))


def _policy(batch: Batch, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    values = torch.randn(batch.token_ids.shape, generator=noise, dtype=torch.float64)
    return (values * 0.5 - 1).requires_grad_()


def _s(x):
    return 1 / (1 + (-x).exp())


def _rho(batch: Batch, logprobs: torch.Tensor, row: int):
    tokens = batch.loss_mask[row].nonzero()[:, 0].tolist()
    return sum(logprobs[row, t] - batch.ref_logprobs[row, t] for t in tokens)


def _reference(name: str, batch: Batch, logprobs: torch.Tensor):
    losses = []
    for row in range(len(batch)):
        if not batch.loss_mask[row].any():
            continue
        z = SETTINGS["beta"] * (_rho(batch, logprobs, row) - float(batch.baselines[row]))
        good = batch.labels[row] > 0
        weight = SETTINGS["desirable_weight" if good else "undesirable_weight"]
        value = _s(z) if good else _s(-z)  # KTO's v / lambda
        losses.append(weight * (1 - value) if name == "kto" else -weight * value.log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", LABEL_LOSSES)
@given(seed=st.integers(0, 10_000))
def test_value_and_gradient_equal_the_paper(name: str, seed: int, random_batch) -> None:
    """Would catch: a sign, weights exchanged, beta on one term only, rows without tokens counted."""
    batch = _labelled(random_batch, seed)
    logprobs = _policy(batch, seed)
    assume(batch.num_loss_sequences)
    got, sums = LABEL_LOSSES[name](batch, logprobs, **SETTINGS)
    want = _reference(name, batch, logprobs)
    torch.testing.assert_close(got, want.detach(), **CLOSE)
    (gradient,) = torch.autograd.grad(got, logprobs)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, logprobs)[0], **CLOSE)
    assert sums["kto/loss"].item() == got.item() and sums["num_sequences"] == batch.num_loss_sequences


@pytest.mark.parametrize("name", LABEL_LOSSES)
@given(seed=st.integers(0, 10_000), cut=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_no_cut_changes_gradient_or_sums(name: str, seed: int, cut: list[int], random_batch) -> None:
    """Would catch: a baseline or mean taken inside a micro-batch, an empty micro-batch that breaks."""
    batch = _labelled(random_batch, seed)
    logprobs = _policy(batch, seed)
    whole, whole_sums = LABEL_LOSSES[name](batch, logprobs, **SETTINGS)
    (want,) = torch.autograd.grad(whole, logprobs)
    shares, parts = [], []
    for part in range(4):
        rows = [row for row in reversed(range(6)) if cut[row] == part]
        micro = batch.select(rows)
        share, sums = LABEL_LOSSES[name](micro, logprobs[rows][:, : micro.token_ids.shape[1]], **SETTINGS)
        shares.append(share)
        parts.append(sums)
    total = torch.stack(shares).sum()
    torch.testing.assert_close(total, whole, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(total, logprobs)[0], want, **CLOSE)
    for key, value in whole_sums.items():
        assert all(list(sums) == list(whole_sums) for sums in parts)
        torch.testing.assert_close(sum(sums[key] for sums in parts), value, **CLOSE)


def test_metrics_of_each_label(random_batch) -> None:
    """Would catch: a mean over all rows where a label's own count is meant; a count that is not there."""
    batch = _labelled(random_batch, 3)
    logprobs = _policy(batch, 3)
    _, sums = kto_loss(batch, logprobs, **SETTINGS)
    counted = [r for r in range(6) if batch.loss_mask[r].any()]
    good = [r for r in counted if batch.labels[r] > 0]
    bad = [r for r in counted if batch.labels[r] < 0]
    assert good and bad and sums["num_desirable"] == len(good) and sums["num_undesirable"] == len(bad)
    for rows, name in ((good, "desirable"), (bad, "undesirable")):
        want = sum(SETTINGS["beta"] * _rho(batch, logprobs, r).item() for r in rows)
        assert sums[f"kto/reward_{name}"].item() == pytest.approx(want)
    assert sums["kto/baseline"].item() == pytest.approx(0.4 * len(counted))
    assert set(KTO_COUNTS) <= set(sums) and set(KTO_COUNTS.values()) <= set(sums)


def test_policy_equal_to_reference_gives_half(random_batch) -> None:
    """Would catch: a baseline that is not 0 where nothing has moved."""
    batch = _labelled(random_batch, 3)
    twisted = mismatched(batch, max_tokens=100)
    same = torch.randn(twisted.token_ids.shape, dtype=torch.float64)
    batch = with_kto_baseline(batch, twisted.replace(ref_logprobs=same), same)
    loss, _ = kto_loss(batch, batch.ref_logprobs, beta=0.7, desirable_weight=1.0, undesirable_weight=1.0)
    assert not batch.baselines.any() and loss.item() == pytest.approx(0.5)


@given(seed=st.integers(0, 10_000))
def test_z0_is_the_mean_over_mismatched_rows_and_not_below_zero(seed: int, random_batch) -> None:
    """Would catch: a max per row, a mean over tokens, empty rows in the mean, a gradient through z0."""
    batch = _labelled(random_batch, seed)
    twisted = mismatched(batch, max_tokens=100)
    policy, reference = _policy(twisted, seed), _policy(twisted, seed + 1).detach()
    twisted = twisted.replace(ref_logprobs=reference)
    ready = with_kto_baseline(batch, twisted, policy)
    rhos = [_rho(twisted, policy, r).item() for r in range(6) if twisted.loss_mask[r].any()]
    want = max(0.0, sum(rhos) / max(len(rhos), 1))
    assert ready.baselines.tolist() == pytest.approx([want] * 6) and not ready.baselines.requires_grad
    assert kto_baseline(torch.tensor([-3.0, 1.0]), torch.zeros(2)) == 0
    assert kto_baseline(torch.tensor([-1.0, 3.0]), torch.zeros(2)) == 1


@given(seed=st.integers(0, 10_000))
def test_bco_baseline_weighs_both_labels_the_same(seed: int, random_batch) -> None:
    """Would catch: a mean over all rows, which drifts to the more frequent label; NaN with one label only."""
    batch = _labelled(random_batch, seed)
    logprobs = _policy(batch, seed)
    means = []
    for sign in (1, -1):
        rows = [r for r in range(6) if batch.labels[r] == sign and batch.loss_mask[r].any()]
        if rows:
            means.append(sum(_rho(batch, logprobs, r).item() for r in rows) / len(rows))
    want = sum(means) / max(len(means), 1)
    assert with_bco_baseline(batch, logprobs).baselines.tolist() == pytest.approx([want] * 6)


def _three_rows() -> Batch:
    return make_sft_batch(
        [
            SftExample("a", prompt_ids=(1, 2, 3), response_ids=(4,)),
            SftExample("b", prompt_ids=(5,), response_ids=(6, 7, 8)),
            SftExample("c", prompt_ids=(9, 9), response_ids=(10, 11)),
        ]
    )


def test_mismatched_rows_are_prompt_i_with_response_i_plus_one() -> None:
    """Would catch: the response's own prompt left in, padding in the middle, masks of the old rows."""
    twisted = mismatched(_three_rows(), max_tokens=100)
    rows = [row[: int(n)].tolist() for row, n in zip(twisted.token_ids, twisted.lengths)]
    assert rows == [[1, 2, 3, 6, 7, 8], [5, 10, 11], [9, 9, 4]]
    learned = [row[mask].tolist() for row, mask in zip(twisted.token_ids, twisted.loss_mask)]
    assert learned == [[6, 7, 8], [10, 11], [4]]
    assert torch.equal(twisted.response_mask, twisted.loss_mask) and twisted.labels is None
    assert (twisted.num_loss_tokens, twisted.num_loss_sequences) == (6, 3)


def test_mismatched_rows_keep_within_the_context() -> None:
    """Would catch: a long prompt with a long response that no model can read."""
    twisted = mismatched(_three_rows(), max_tokens=5)
    assert twisted.token_ids[0].tolist() == [1, 2, 3, 6, 7]
    with pytest.raises(ValueError, match="'a' has a prompt of 3 tokens.*max_tokens=3"):
        mismatched(_three_rows(), max_tokens=3)
    with pytest.raises(ValueError, match="a batch of 1 rows has no mismatched pair"):
        mismatched(_three_rows().select([0]), max_tokens=100)


def test_nothing_outside_the_loss_mask_matters(random_batch) -> None:
    """Would catch: NaN from padding or from a masked row in the loss or in its gradient."""
    batch = _labelled(random_batch, 5)
    logprobs = _policy(batch, 5)
    want, _ = kto_loss(batch, logprobs, **SETTINGS)
    spoilt = torch.where(batch.loss_mask, logprobs.detach(), math.nan).requires_grad_()
    dirty = batch.replace(ref_logprobs=torch.where(batch.loss_mask, batch.ref_logprobs, math.nan))
    got, _ = kto_loss(dirty, spoilt, **SETTINGS)
    (gradient,) = torch.autograd.grad(got, spoilt)
    assert torch.equal(got, want) and not gradient[~batch.loss_mask].any() and not gradient.isnan().any()


@pytest.mark.parametrize("name", ["labels", "ref_logprobs", "baselines"])
def test_a_missing_field_is_named(name: str, random_batch) -> None:
    """Would catch: a loss without its reference point."""
    batch = _labelled(random_batch, 3).replace(**{name: None})
    with pytest.raises(ValueError, match=f"needs {name}, from"):
        kto_loss(batch, _policy(batch, 3), **SETTINGS)


@pytest.mark.parametrize("name", LABEL_LOSSES)
def test_gradcheck(name: str, random_batch) -> None:
    """Would catch: a detach in the wrong place."""
    batch = _labelled(random_batch, 3)
    assert torch.autograd.gradcheck(lambda p: LABEL_LOSSES[name](batch, p, **SETTINGS)[0], _policy(batch, 3))
