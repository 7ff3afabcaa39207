"""A step's scored groups: one round of sampling, or as many as dynamic sampling needs.

Dynamic sampling (DAPO, arXiv 2503.14476 section 3.2) drops groups whose responses are all as good, and samples further
prompts until the step is full. How good a response is says its reward before the penalty on its length. Rounds are
capped: after algorithm.max_sampling_rounds a step goes on with the groups it has, and with all of the last round where it
has none.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.records import RolloutGroup
from rlhf.trainers.evaluate import flatten
from rlhf.trainers.replay import has_advantage
from rlhf.trainers.stage import Stage


def scored_groups(stage: Stage, step: int) -> list[RolloutGroup]:
    """The step's groups with rewards, in the order of their prompts."""
    wanted, algorithm = stage.recipe.trainer.prompts_per_step, stage.recipe.algorithm
    if not algorithm.dynamic_sampling:
        return _penalized(stage, _round(stage, step, first=0))
    kept: list[RolloutGroup] = []
    sampled = 0
    for _ in range(algorithm.max_sampling_rounds):
        groups = _round(stage, step, first=sampled)
        sampled += len(groups)
        kept += [group for group in groups if has_advantage(group)]
        if len(kept) >= wanted:
            break
    stage.note(
        {
            "rollout/groups_sampled": float(sampled),
            "rollout/groups_kept_frac": len(kept) / sampled,
            "rollout/groups_unused": float(max(len(kept) - wanted, 0)),
        }
    )
    return _penalized(stage, kept[:wanted] or groups)


def _round(stage: Stage, step: int, *, first: int) -> list[RolloutGroup]:
    groups = stage.generate(stage.next_rows(), step, first=first)
    return regroup(groups, stage.judged(flatten(groups)))


def _penalized(stage: Stage, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    return regroup(groups, stage.penalized(flatten(groups)))


def regroup(groups: Sequence[RolloutGroup], rollouts: Sequence[object]) -> list[RolloutGroup]:
    """The groups with their rollouts replaced, in order."""
    remaining = iter(rollouts)
    return [RolloutGroup(g.prompt, tuple(next(remaining) for _ in g.rollouts)) for g in groups]
