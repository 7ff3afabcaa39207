"""Warnings: each rule fires on what it is for, once, and not on a healthy run."""

from __future__ import annotations

import math

import pytest

from rlhf.metric_rules import RULES, MetricWatch

BAD = {
    "reward/error_frac": 0.02,
    "reward/timeout_frac": 0.02,
    "reward/std": 0.0,
    "reward/groups_zero_std_frac": 1.0,
    "policy/clip_frac": 0.4,
    "policy/entropy": 0.001,
    "policy/kl_ref": 3.0,
    "value/explained_variance": -0.1,
    "rollout/truncated_frac": 0.9,
    "mismatch/logprob_abs_mean": 0.2,
    "robust/skipped_steps": 1,
    "robust/bad_rows": 1,
}
HEALTHY = {
    "reward/mean": 0.5,
    "reward/std": 0.4,
    "reward/error_frac": 0.0,
    "reward/groups_zero_std_frac": 0.6,
    "policy/clip_frac": 0.05,
    "policy/entropy": 0.2,
    "policy/kl_ref": 0.3,
    "value/explained_variance": 0.6,
    "rollout/truncated_frac": 0.2,
    "mismatch/logprob_abs_mean": 0.0,
    "robust/skipped_steps": 0,
    "eval/test/pass@1": 0.5,
}


def test_every_rule_has_a_bad_value_here():
    assert set(BAD) == set(RULES)


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_rule_fires_once_after_its_streak(name):
    # Catches: an inverted threshold, a warning at every step, one bad step called a trend.
    watch, needed = MetricWatch(), RULES[name].in_a_row
    said = [watch.update({name: BAD[name]}) for _ in range(needed + 5)]
    assert [bool(s) for s in said] == [i == needed - 1 for i in range(needed + 5)]
    assert said[needed - 1][0].startswith(f"{name} = ")


@pytest.mark.parametrize("name", sorted(n for n in RULES if RULES[n].in_a_row > 1))
def test_a_good_step_ends_a_streak(name):
    watch, needed = MetricWatch(), RULES[name].in_a_row
    steps = ([BAD[name]] * (needed - 1) + [HEALTHY[name]]) * 3
    assert not any(watch.update({name: value}) for value in steps)


def test_a_healthy_run_is_silent():
    watch = MetricWatch()
    assert not any(watch.update(HEALTHY) for _ in range(50))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_said_for_any_metric(value):
    # Catches: NaN slipping through, since every comparison with it is False.
    watch = MetricWatch()
    assert watch.update({"my/metric": value}) and not watch.update({"my/metric": value})


def test_a_falling_evaluation_warns_only_while_the_training_reward_rises():
    # Catches: reward hacking unnoticed; noise of an evaluation called reward hacking.
    def said(rewards, evaluations):
        watch = MetricWatch()
        rows = zip(rewards, evaluations, strict=True)
        return [w for r, e in rows for w in watch.update({"reward/mean": r, "eval/test/pass@1": e})]

    assert len(said([0.2, 0.4, 0.6, 0.8], [0.5, 0.6, 0.5, 0.4])) == 1
    assert not said([0.2, 0.4, 0.6, 0.8], [0.5, 0.6, 0.58, 0.57])
    assert not said([0.8, 0.6, 0.4, 0.2], [0.5, 0.6, 0.5, 0.4])


def test_chosen_answers_that_are_left_are_said_once():
    """Would catch: DPO that pushes both answers away, of which held-out pairs say nothing; a warning at every sway."""
    watch = MetricWatch()
    said = [watch.update({"dpo/logprob_chosen": value}) for value in (-0.4, -2.0, -0.3, -2.9, -4.0)]
    assert [bool(s) for s in said] == [False, False, False, True, False]
    assert "the chosen answers were at -0.4" in said[3][0]
    assert not any(MetricWatch().update({"dpo/logprob_chosen": value}) for value in (-100.0, -150.0))
