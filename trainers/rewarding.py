"""Everything that gives a rollout its reward: rules, a reward model, a judge, the penalty on overlong responses.

Not here: the rules and how they are called, and what a judge reads (`rlhf.reward`), and the models (`rlhf.trainers.worker`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rlhf.batching import make_batch
from rlhf.overlong import overlong_penalty
from rlhf.recipe.schema import JudgeConfig, Recipe
from rlhf.records import Rollout
from rlhf.reward import Judge, Scorer
from rlhf.reward.score import stop_if_too_many_missing
from rlhf.trainers.roles import JudgeModel, RewardModel

OVERLONG_PART = "overlong"


@dataclass(frozen=True)
class ModelPart:
    """A part of the reward that a model gives."""

    name: str  # among a rollout's reward parts
    weight: float
    score: Callable[[Sequence[Rollout]], Sequence[float]]
    missing: str = ""  # why a score may be NaN
    stats: Callable[[], Mapping[str, float]] = dict  # further metrics of the last call


def reward_model_part(model: RewardModel, *, weight: float) -> ModelPart:
    """A reward model's score of the whole response."""

    def score(rollouts: Sequence[Rollout]) -> list[float]:
        return model.score(make_batch(rollouts, group_ids=range(len(rollouts)), needs_reward=False)).tolist()

    return ModelPart("reward_model", weight, score)


def judge_part(config: JudgeConfig, model: JudgeModel) -> ModelPart:
    """A judge's probability of the good verdict, or of winning."""
    judge = Judge(config, model.ask)
    return ModelPart("judge", config.weight, judge.score, judge.missing, lambda: judge.stats)


class RewardSum:
    """The rules' weighted sum, and what models give on top. `score`, `stats` and `answer_of` are those of a `Scorer`."""

    def __init__(self, rules: Scorer | None, parts: Sequence[ModelPart]) -> None:
        self._rules, self._parts = rules, parts
        self.stats: dict[str, float] = {}
        self.answer_of = rules.answer_of if rules is not None else None

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with reward, parts and errors. Where a part is missing the whole reward is.

        Raises RewardError when more than 5 % of the rewards, and more than one, are missing."""
        if self._rules is None:
            scored = [r.replace(reward=0.0) for r in rollouts]
        else:
            scored = self._rules.score(rollouts)
        for part in self._parts:
            scored = [
                add_part(r, part.name, value, weight=part.weight, missing=part.missing)
                for r, value in zip(scored, part.score(scored), strict=True)
            ]
        self.stats = reward_metrics(
            scored, [part.name for part in self._parts], self._rules.stats if self._rules else {}
        )
        for part in self._parts:
            self.stats |= part.stats()
        stop_if_too_many_missing(scored)
        return scored


def add_part(rollout: Rollout, name: str, value: float, *, weight: float, missing: str = "") -> Rollout:
    """The rollout with one more part of its reward; a missing reward stays missing, and a value that is not finite makes
    it so, for the reason `missing`."""
    if not math.isfinite(value):
        error = f"{name} gave {value}" + (f": {missing}" if missing else "")
        return rollout.replace(
            reward=None, reward_error="; ".join(filter(None, (rollout.reward_error, error)))
        )
    parts = {**rollout.reward_parts, name: value}
    if rollout.reward is None:
        return rollout.replace(reward_parts=parts)
    return rollout.replace(reward=rollout.reward + weight * value, reward_parts=parts)


def reward_metrics(
    rollouts: Sequence[Rollout], parts: Sequence[str], rule_stats: Mapping[str, float]
) -> dict[str, float]:
    """`reward/*` of the summed rewards and of the models' `parts`; the rules' own parts stay."""
    rewards = torch.tensor([r.reward for r in rollouts if r.reward is not None], dtype=torch.float64)
    metrics = dict(rule_stats)
    for name in parts:
        values = [r.reward_parts[name] for r in rollouts if name in r.reward_parts]
        metrics[f"reward/{name}/mean"] = sum(values) / len(values) if values else math.nan
    missing = 1.0 - len(rewards) / len(rollouts)
    metrics["reward/error_frac"] = missing - metrics.get("reward/timeout_frac", 0.0)
    if len(rewards):
        metrics |= {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "reward/min": rewards.min().item(),
            "reward/max": rewards.max().item(),
        }
    return metrics


def merged_metrics(calls: Sequence[tuple[Sequence[Rollout], Mapping[str, float]]]) -> dict[str, float]:
    """The metrics of several calls of a scorer as one: those of rewards over all rollouts, any other as the mean of its
    calls by their number of rollouts, without those that gave NaN."""
    if len(calls) == 1:
        return dict(calls[0][1])
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for _, stats in calls for name in stats):
        known = [(len(r), s[name]) for r, s in calls if not math.isnan(s.get(name, math.nan))]
        total = sum(count for count, _ in known)
        means[name] = sum(count * value for count, value in known) / total if known else math.nan
    parts = [name.split("/")[1] for name in means if name.startswith("reward/") and name.count("/") == 2]
    return reward_metrics([r for rollouts, _ in calls for r in rollouts], parts, means)


def shorten(rollouts: Sequence[Rollout], recipe: Recipe) -> list[Rollout]:
    """The rollouts with DAPO's penalty for coming close to the longest response allowed."""
    a, longest = recipe.algorithm, recipe.rollout.max_response_tokens
    if not a.overlong_buffer:
        return list(rollouts)
    penalties = [
        overlong_penalty(len(r.response_ids), max_tokens=longest, overlong_buffer=a.overlong_buffer)
        for r in rollouts
    ]
    return [
        add_part(r, OVERLONG_PART, p, weight=a.overlong_penalty).replace(penalty=a.overlong_penalty * p)
        for r, p in zip(rollouts, penalties, strict=True)
    ]


def penalty_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`reward/overlong/mean`, unweighted, where there is such a penalty."""
    found = [r.reward_parts[OVERLONG_PART] for r in rollouts if OVERLONG_PART in r.reward_parts]
    return {f"reward/{OVERLONG_PART}/mean": sum(found) / len(found)} if found else {}
