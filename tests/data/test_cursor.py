"""The data position: a function of (rows, seed, step), every row once an epoch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.cursor import num_steps, step_rows
from rlhf.rng import permutation


@given(
    n=st.integers(1, 50), rows_per_step=st.integers(1, 50), seed=st.integers(0, 5), steps=st.integers(1, 12)
)
def test_steps_laid_end_to_end_are_the_epochs(n: int, rows_per_step: int, seed: int, steps: int) -> None:
    """Catches rows skipped or doubled at an epoch's border, and an epoch that repeats the order of the one
    before."""
    if n < rows_per_step:
        return
    stream = [
        i for step in range(steps) for i in step_rows(n, seed=seed, step=step, rows_per_step=rows_per_step)
    ]
    assert len(stream) == steps * rows_per_step
    epochs = [i for epoch in range(len(stream) // n + 1) for i in permutation(n, seed, epoch)]
    assert stream == epochs[: len(stream)]


def test_a_position_needs_no_history() -> None:
    """Catches a hidden state: step 1000 alone equals step 1000 of a whole run."""
    assert step_rows(7, seed=3, step=1000, rows_per_step=4) == [
        [int(i) for e in range(600) for i in permutation(7, 3, e)][4000 + i] for i in range(4)
    ]


def test_another_seed_is_another_order() -> None:
    assert step_rows(100, seed=0, step=0, rows_per_step=50) != step_rows(
        100, seed=1, step=0, rows_per_step=50
    )


def test_epochs_become_steps() -> None:
    """Catches a last partial step that is forgotten."""
    assert num_steps(10, epochs=2, rows_per_step=5) == 4
    assert num_steps(10, epochs=1, rows_per_step=4) == 3


def test_fewer_rows_than_a_step_are_refused() -> None:
    with pytest.raises(
        ValueError, match="has 3 rows, fewer than one step's 4; lower trainer.prompts_per_step to at most 3"
    ):
        step_rows(3, seed=0, step=0, rows_per_step=4)
    with pytest.raises(ValueError, match="step=-1 is negative"):
        step_rows(3, seed=0, step=-1, rows_per_step=2)
