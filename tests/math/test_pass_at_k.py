"""pass@k against counting every draw, and the majority's answer."""

from __future__ import annotations

from itertools import combinations

import pytest

from rlhf.pass_at_k import majority, pass_at_k


def share_with_a_pass(c: int, n: int, k: int) -> float:
    """Of all sets of k of n responses, the first c of which pass, those that hold one of them."""
    draws = list(combinations(range(n), k))
    return sum(min(draw) < c for draw in draws) / len(draws)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_counts_draws_without_replacement(n):
    """Would catch: the biased 1 - (1 - c/n)^k, and a product that turns negative where fewer than k failed."""
    for k in range(1, n + 1):
        for c in range(n + 1):
            assert pass_at_k([c], n, k) == pytest.approx(share_with_a_pass(c, n, k), abs=1e-12), (n, k, c)
    expected = sum(share_with_a_pass(c, n, 1) for c in (0, n, 1)) / 3
    assert pass_at_k([0, n, 1], n, 1) == pytest.approx(expected)


def test_large_counts_do_not_overflow():
    """Would catch: binomials as floats."""
    assert pass_at_k([3], 4000, 1000) == pytest.approx(1 - 0.75**3, abs=1e-3)


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=f"pass@{k} of 3"):
        pass_at_k([1], 3, k)


def test_majority_breaks_ties_by_place_and_gives_no_vote_to_none():
    """Would catch: None winning the vote, a tie decided by hash order, the place of the last one."""
    assert majority([None, None, None, 7, 5, 5]) == 4
    assert majority(["b", "a", "a", "b"]) == 0
    assert majority([None, None]) is None
