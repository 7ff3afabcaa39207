"""A step's scored groups: what dynamic sampling keeps, when it stops, and what it says."""

from __future__ import annotations

import pytest

from rlhf.trainers.rounds import regroup, scored_groups
from tests.trainers.fake_roles import FakeSampler, FakeScorer, fake_stage, group


def stage_with(flat: set[int], folder, monkeypatch, *, rounds: int = 3, dynamic: bool = True):
    """Two prompts a step with two responses each; both get the same reward where the group's number is in `flat`."""

    def reward(rollout) -> float:
        _, number, sample = map(int, rollout.sample_id.split("/"))
        return 1.0 if number in flat else float(sample)

    recipe = {
        "method": "grpo",
        "reward": [{"function": "gsm8k"}],
        "rollout": {"group_size": 2},
        "algorithm": {"dynamic_sampling": dynamic, "max_sampling_rounds": rounds},
        "trainer": {"steps": 1, "prompts_per_step": 2},
    }
    return fake_stage(recipe, folder, monkeypatch, sampler=FakeSampler(), scorer=FakeScorer(reward))


def numbers(groups) -> list[int]:
    return [int(g.rollouts[0].sample_id.split("/")[1]) for g in groups]


def noted(stage) -> dict[str, float]:
    return {name.removeprefix("rollout/"): value for name, value in stage._metrics.items()}


@pytest.mark.parametrize(
    ("flat", "rounds", "kept", "sampled", "share", "unused"),
    [
        (set(), 3, [0, 1], 2, 1.0, 0),
        ({0, 1, 3}, 3, [2, 4], 6, 3 / 6, 1),
        ({0, 1, 3}, 2, [2], 4, 1 / 4, 0),
        ({0, 1, 2, 3}, 2, [2, 3], 4, 0.0, 0),
    ],
    ids=["none flat", "three rounds", "cut short", "all flat: the last round"],
)
def test_groups_with_equal_rewards_are_replaced(
    flat, rounds, kept, sampled, share, unused, tmp_path, monkeypatch
):
    """Would catch: flat groups kept, useful ones dropped, rounds without end, a step of more groups than asked for, numbers
    of kept groups alone."""
    stage = stage_with(flat, tmp_path, monkeypatch, rounds=rounds)
    groups = scored_groups(stage, 0)
    assert numbers(groups) == kept
    said = noted(stage)
    assert (said["groups_sampled"], said["groups_unused"]) == (sampled, unused)
    assert said["groups_kept_frac"] == pytest.approx(share)


def test_without_dynamic_sampling_one_round_is_all(tmp_path, monkeypatch):
    """Would catch: groups dropped although nobody asked for it."""
    stage = stage_with({0, 1}, tmp_path, monkeypatch, dynamic=False)
    assert numbers(scored_groups(stage, 0)) == [0, 1] and len(stage.sampler.asked) == 1


def test_rewards_come_back_to_the_prompt_they_belong_to():
    """Would catch: a flat list cut at the wrong places where groups differ in size."""
    groups = [group(0, 0.0, 1.0, 2.0), group(1, 3.0)]
    scored = [r.replace(reward=r.reward * 10) for g in groups for r in g.rollouts]
    assert [g.rewards for g in regroup(groups, scored)] == [(0.0, 10.0, 20.0), (30.0,)]
