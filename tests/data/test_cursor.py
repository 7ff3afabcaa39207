"""The data position: a function of (rows, seed, rows taken before), every row once an epoch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.cursor import num_steps, rows_from
from rlhf.rng import permutation


@given(
    n=st.integers(1, 50), seed=st.integers(0, 5), shares=st.lists(st.floats(0, 1), min_size=1, max_size=12)
)
def test_draws_laid_end_to_end_are_the_epochs(n: int, seed: int, shares: list[float]) -> None:
    """Catches rows skipped or doubled at an epoch's border or where steps take different numbers of rows, and an epoch
    that repeats the order of the one before."""
    stream: list[int] = []
    for share in shares:
        count = round(share * n)
        taken = rows_from(n, seed=seed, position=len(stream), count=count)
        assert len(taken) == count
        stream += taken
    epochs = [i for epoch in range(len(stream) // n + 1) for i in permutation(n, seed, epoch)]
    assert stream == epochs[: len(stream)]


def test_a_position_needs_no_history() -> None:
    """Catches a hidden state: the rows after 4000 alone equal those of a whole run."""
    assert rows_from(7, seed=3, position=4000, count=4) == [
        [int(i) for e in range(600) for i in permutation(7, 3, e)][4000 + i] for i in range(4)
    ]


def test_another_seed_is_another_order() -> None:
    assert rows_from(100, seed=0, position=0, count=50) != rows_from(100, seed=1, position=0, count=50)


def test_epochs_become_steps() -> None:
    """Catches a last partial step that is forgotten."""
    assert num_steps(10, epochs=2, rows_per_step=5) == 4
    assert num_steps(10, epochs=1, rows_per_step=4) == 3


def test_fewer_rows_than_a_step_are_refused() -> None:
    with pytest.raises(
        ValueError, match="has 3 rows, fewer than one step's 4; lower trainer.prompts_per_step to at most 3"
    ):
        rows_from(3, seed=0, position=0, count=4)
    with pytest.raises(ValueError, match="position=-2 is negative"):
        rows_from(3, seed=0, position=-2, count=2)
