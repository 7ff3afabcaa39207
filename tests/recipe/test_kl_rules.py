"""Which estimator a recipe's KL gets, and which it may not have."""

from __future__ import annotations

import pytest

from rlhf.recipe import rules
from rlhf.recipe.load import RecipeError, plan_from_dict
from rlhf.recipe.schema import Recipe


def recipe_of(method: str, **algorithm) -> Recipe:
    raw = {
        "method": method,
        "model": {"path": "none"},
        "data": {"path": "none"},
        "reward": [{"function": "gsm8k"}],
        "algorithm": {"kl_coef": 0.1, **algorithm},
        "trainer": {"steps": 1},
    }
    return plan_from_dict(raw).stages[0].recipe


@pytest.mark.parametrize(
    ("method", "algorithm", "want"),
    [
        ("ppo", {}, "k1"),
        ("ppo", {"kl_in_reward": False}, "k3"),
        ("grpo", {}, "k3"),
        ("grpo", {"kl_in_reward": True}, "k1"),
        ("grpo", {"advantage": "rloo"}, "k1"),
        ("grpo", {"advantage": "reinforce_pp"}, "k1"),
        ("grpo", {"advantage": "reinforce_pp_baseline"}, "k2"),
        ("grpo", {"kl_estimator": "k3_k2"}, "k3_k2"),
    ],
)
def test_the_estimator_follows_from_where_the_kl_is(method: str, algorithm: dict, want: str) -> None:
    """Would catch: k3 in a reward by default, where it pushes away from the reference."""
    assert rules.decided(recipe_of(method, **algorithm)).kl_estimator == want


@pytest.mark.parametrize(
    ("method", "algorithm", "match"),
    [
        ("ppo", {"kl_estimator": "k3"}, "k3 in the reward .* use k1"),
        ("grpo", {"advantage": "rloo", "kl_estimator": "k2"}, "k2 in the reward .* use k1"),
        ("grpo", {"kl_in_reward": True, "kl_estimator": "k3_k2"}, "k3_k2 in the reward .* use k1"),
        ("grpo", {"kl_estimator": "k1"}, "k1 in the loss has zero expected gradient"),
    ],
)
def test_an_estimator_in_the_wrong_place_is_refused(method: str, algorithm: dict, match: str) -> None:
    """Would catch: a penalty that is obeyed although it does nothing, or the opposite."""
    with pytest.raises(RecipeError, match=match):
        recipe_of(method, **algorithm)
