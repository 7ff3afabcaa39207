"""Several training sets as one: how often each row comes, and what binds a run to the mixture."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data import mixed
from rlhf.data.rows import Dataset


def _dataset(name: str, rows: int) -> Dataset[str]:
    return Dataset(
        tuple(f"{name}/{i}" for i in range(rows)), f"print of {name}", {"kept": rows, "bad_rows": 1}
    )


@given(rows=st.integers(1, 40), weight=st.floats(0.01, 5))
def test_a_weight_is_how_often_rows_come(rows: int, weight: float) -> None:
    """Would catch: rows lost by rounding, a share taken from the beginning alone."""
    total = int(rows * weight + 1e-9)
    if total == 0:
        with pytest.raises(ValueError, match="leaves none of a set's"):
            mixed([_dataset("a", 5), _dataset("b", rows)], [1.0, weight])
        return
    found = Counter(mixed([_dataset("a", 5), _dataset("b", rows)], [1.0, weight]).items)
    times = [found.get(f"b/{i}", 0) for i in range(rows)]
    assert abs(sum(times) - rows * weight) <= 1 and max(times) - min(times) <= 1
    for start in range(rows):  # evenly: no stretch has more than its share
        for end in range(start + 1, rows + 1):
            assert abs(sum(times[start:end]) - (end - start) * weight) <= 1 + 1e-6
    assert [found[f"a/{i}"] for i in range(5)] == [1] * 5


def test_one_set_alone_stays_as_it_is() -> None:
    """Would catch: a changed fingerprint, and with it every checkpoint of a run without a mixture refused."""
    alone = _dataset("a", 3)
    assert mixed([alone], [1.0]) is alone


def test_another_weight_or_set_is_another_mixture() -> None:
    """Would catch: a run that goes on with another mixture than it was started with; counts of one set alone."""
    a, b = _dataset("a", 4), _dataset("b", 4)
    prints = {
        mixed(sets, weights).fingerprint
        for sets, weights in (([a, b], [1, 1]), ([a, b], [1, 2]), ([b, a], [1, 1]))
    }
    assert len(prints) == 3
    assert mixed([a, b], [1.0, 0.5]).counts == {"kept": 6, "bad_rows": 2}
