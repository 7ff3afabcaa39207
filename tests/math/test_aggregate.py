"""Aggregation against loops, and its independence of padding, order and cutting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.aggregate import AGGREGATIONS, aggregate
from rlhf.records import Batch

LENGTH = 20


def _aggregate(per_token: torch.Tensor, batch: Batch, how: str) -> torch.Tensor:
    counts = {"num_loss_tokens": batch.num_loss_tokens, "num_loss_sequences": batch.num_loss_sequences}
    return aggregate(per_token, batch.loss_mask, how=how, constant_length=LENGTH, **counts)


def _loop(per_token: torch.Tensor, batch: Batch, how: str) -> float:
    rows = [[x for x, m in zip(*row) if m] for row in zip(per_token.tolist(), batch.loss_mask.tolist())]
    rows = [row for row in rows if row]
    if not rows:
        return 0.0
    if how == "token_mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if how == "sequence_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / (len(rows) * LENGTH)


@pytest.mark.parametrize("how", AGGREGATIONS)
@given(seed=st.integers(0, 10_000))
def test_equal_to_the_loop_with_nothing_from_outside_the_mask(how: str, seed: int, random_batch) -> None:
    """Would catch: padding in a denominator, masked rows counted as sequences, mask * NaN."""
    batch = random_batch(seed)
    values = torch.randn(
        batch.token_ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    want = _loop(values, batch, how)
    per_token = torch.where(batch.loss_mask, values, math.nan).requires_grad_()
    loss = _aggregate(per_token, batch, how)
    assert loss.item() == pytest.approx(want, abs=1e-12)
    loss.backward()
    assert not per_token.grad[~batch.loss_mask].any()
    assert not per_token.grad.isnan().any()


@pytest.mark.parametrize("how", AGGREGATIONS)
@given(
    seed=st.integers(0, 10_000),
    pad=st.integers(0, 4),
    cut=st.lists(st.integers(0, 2), min_size=5, max_size=5),
)
def test_padding_order_and_cutting_do_not_matter(
    how: str, seed: int, pad: int, cut: list[int], random_batch
) -> None:
    """Would catch: a mean inside a micro-batch, later averaged over micro-batches of other sizes."""
    batch = random_batch(seed)
    values = torch.randn(
        batch.token_ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    whole = _aggregate(values, batch, how)
    wide = batch.replace(
        **{
            name: torch.nn.functional.pad(getattr(batch, name), (0, pad))
            for name in vars(batch)
            if isinstance(getattr(batch, name), torch.Tensor) and getattr(batch, name).dim() == 2
        }
    )
    torch.testing.assert_close(_aggregate(torch.nn.functional.pad(values, (0, pad)), wide, how), whole)
    parts = [[row for row in reversed(range(5)) if cut[row] == part] for part in range(3)]
    shares = []
    for rows in parts:
        micro = batch.select(rows)
        shares.append(_aggregate(values[rows][:, : micro.token_ids.shape[1]], micro, how))
    torch.testing.assert_close(torch.stack(shares).sum(), whole)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_a_step_without_loss_tokens_gives_zero(how: str) -> None:
    """Would catch: 0 / 0 when every response of a step is masked."""
    per_token = torch.ones(2, 3, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = aggregate(per_token, mask, how=how, num_loss_tokens=0, num_loss_sequences=0, constant_length=8)
    loss.backward()
    assert loss.item() == 0 and not per_token.grad.any()


def test_bad_input_is_refused() -> None:
    """Would catch: an unknown name falling through to some default."""
    counts = {"num_loss_tokens": 1, "num_loss_sequences": 1, "constant_length": None}
    ones, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="'mean' is unknown; choose one of token_mean, sequence_mean"):
        aggregate(ones, mask, how="mean", **counts)
    with pytest.raises(ValueError, match="constant_length=None"):
        aggregate(ones, mask, how="constant_length", **counts)
