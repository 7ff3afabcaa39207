"""From a recipe to what a stage works with: what need not be evaluated again."""

from __future__ import annotations

from copy import deepcopy

import pytest

from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import Recipe
from rlhf.runtime.assemble import evaluated_before
from tests.e2e.running import TINY, merged


def recipe_of(changes: dict) -> Recipe:
    return plan_from_dict(merged(deepcopy(TINY), changes)).stages[1].recipe


OTHER_ROWS = {"task_args": {"count": 21}}


@pytest.mark.parametrize(
    ("start", "left_out"),
    [
        ({}, {"sums"}),
        ({"evaluation": {"every": None, "keep_best": "eval/sums/pass@1"}}, {"sums"}),
        ({"evaluation": {"max_response_tokens": 12}}, {"sums"}),  # which is the rollout's
        ({"evaluation": {"sets": {}, "every": None}}, set()),
        ({"evaluation": {"sets": {"sums": OTHER_ROWS}}}, set()),
        ({"evaluation": {"temperature": 0.5}}, set()),
        ({"evaluation": {"max_response_tokens": 11}}, set()),
        ({"evaluation": {"correct_above": 0.9}}, set()),
        ({"reward": [{"function": "gsm8k"}]}, set()),
        ({"model": {"dtype": "bfloat16"}}, set()),
        (
            {"stages": {"grpo": {"trainer": {"ema_decay": 0.9}}}},
            {"sums"},
        ),  # the average is what was evaluated
    ],
    ids=str,
)
def test_a_set_is_left_out_where_its_values_are_known(start: dict, left_out: set[str]) -> None:
    """Would catch: a second stage whose curve has no beginning, because the first one evaluated nothing or otherwise."""
    assert evaluated_before(recipe_of({}), recipe_of(start)) == left_out


def test_without_an_earlier_stage_everything_is_evaluated() -> None:
    assert evaluated_before(recipe_of({}), None) == set()
