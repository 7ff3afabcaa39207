"""DAPO's soft penalty on length."""

from __future__ import annotations

import pytest

from rlhf.overlong import overlong_penalty


@pytest.mark.parametrize(
    ("num_tokens", "want"), [(0, 0), (16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (30000, -1)]
)
def test_the_paper_s_numbers(num_tokens: int, want: float) -> None:
    """Would catch: a penalty of the whole length, a positive sign, one that goes on below -1."""
    assert overlong_penalty(num_tokens, max_tokens=20480, overlong_buffer=4096) == want


@pytest.mark.parametrize("overlong_buffer", [0, 101])
def test_a_buffer_that_does_not_fit_is_refused(overlong_buffer: int) -> None:
    """Would catch: a division by zero, or a penalty on every response."""
    with pytest.raises(ValueError, match=f"overlong_buffer={overlong_buffer} with max_tokens=100"):
        overlong_penalty(50, max_tokens=100, overlong_buffer=overlong_buffer)
