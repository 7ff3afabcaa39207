"""Everything that gives a rollout its reward: rules, a reward model, the penalty on overlong responses.

Not here: the rules and how they are called (`rlhf.reward`), and the reward model itself (`rlhf.trainers.worker`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.batching import make_batch
from rlhf.overlong import overlong_penalty
from rlhf.recipe.schema import Recipe
from rlhf.records import Rollout
from rlhf.reward import Scorer
from rlhf.trainers.roles import RewardModel

MODEL_PART = "reward_model"  # its name among a rollout's reward parts
OVERLONG_PART = "overlong"


class RewardSum:
    """The rules' weighted sum, and a reward model's score on top. `score` and `stats` are those of a `Scorer`."""

    def __init__(self, rules: Scorer | None, model: RewardModel, *, weight: float) -> None:
        self._rules, self._model, self._weight = rules, model, weight
        self.stats: dict[str, float] = {}
        self.answer_of = rules.answer_of if rules is not None else None

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with reward, parts and errors. Where a rule failed the whole reward is missing."""
        if self._rules is None:
            rollouts = [r.replace(reward=0.0) for r in rollouts]
        else:
            rollouts = self._rules.score(rollouts)
        scores = self._model.score(make_batch(rollouts, group_ids=range(len(rollouts)), needs_reward=False))
        scored = [
            add_part(rollout, MODEL_PART, score, weight=self._weight)
            for rollout, score in zip(rollouts, scores.tolist(), strict=True)
        ]
        self.stats = reward_metrics(scored, self._rules.stats if self._rules else {})
        return scored


def add_part(rollout: Rollout, name: str, value: float, *, weight: float) -> Rollout:
    """The rollout with one more part of its reward; a missing reward stays missing."""
    parts = {**rollout.reward_parts, name: value}
    if rollout.reward is None:
        return rollout.replace(reward_parts=parts)
    if not torch.isfinite(torch.tensor(value)):
        error = f"{name} gave {value}"
        return rollout.replace(reward=None, reward_parts=parts, reward_error=error)
    return rollout.replace(reward=rollout.reward + weight * value, reward_parts=parts)


def reward_metrics(rollouts: Sequence[Rollout], rule_stats: dict[str, float]) -> dict[str, float]:
    """`reward/*` of the summed rewards; the rules' own parts and error shares stay."""
    rewards = torch.tensor([r.reward for r in rollouts if r.reward is not None], dtype=torch.float64)
    parts = [r.reward_parts[MODEL_PART] for r in rollouts if MODEL_PART in r.reward_parts]
    metrics = dict(rule_stats)
    if parts:
        metrics[f"reward/{MODEL_PART}/mean"] = sum(parts) / len(parts)
    if len(rewards):
        metrics |= {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "reward/min": rewards.min().item(),
            "reward/max": rewards.max().item(),
        }
    return metrics


def shorten(rollouts: Sequence[Rollout], recipe: Recipe) -> list[Rollout]:
    """The rollouts with DAPO's penalty for coming close to the longest response allowed."""
    a, longest = recipe.algorithm, recipe.rollout.max_response_tokens
    if not a.overlong_buffer:
        return list(rollouts)
    penalties = [
        overlong_penalty(len(r.response_ids), max_tokens=longest, overlong_buffer=a.overlong_buffer) for r in rollouts
    ]
    return [add_part(r, OVERLONG_PART, p, weight=a.overlong_penalty) for r, p in zip(rollouts, penalties, strict=True)]
