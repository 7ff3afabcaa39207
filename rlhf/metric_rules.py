"""When a metric is worth a warning: a table of rules, and the watch that says each one once.

Here: thresholds and the sentence that explains them. Not here: rules that stop a run (they belong to the
component that can act: the scorer, the trainer, the queue).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    is_bad: Callable[[float], bool]
    sentence: str  # what it means and what to look at
    in_a_row: int = 1  # records in a row that must be bad


def above(limit: float) -> Callable[[float], bool]:
    return lambda value: value > limit


def below(limit: float) -> Callable[[float], bool]:
    return lambda value: value < limit


RULES: dict[str, Rule] = {
    "reward/error_frac": Rule(
        above(0.01), "more than 1 % of the rewards are missing; those samples are left out of the loss"
    ),
    "reward/timeout_frac": Rule(above(0.01), "more than 1 % of the rewards ran into their deadline"),
    "reward/std": Rule(
        lambda value: value == 0.0, "every response gets the same reward: there is nothing to learn from", 5
    ),
    "reward/groups_zero_std_frac": Rule(
        lambda value: value >= 1.0,
        "no group has two different rewards, so every advantage is 0; the task is too easy or too hard",
        3,
    ),
    "policy/clip_frac": Rule(
        above(0.3), "more than 30 % of the tokens are clipped; lower trainer.lr or take fewer passes"
    ),
    "policy/entropy": Rule(
        below(0.01),
        "the policy has all but stopped exploring; lower trainer.lr or raise algorithm.entropy_coef",
    ),
    "policy/kl_ref": Rule(
        above(2.0), "the policy is far from the reference; raise algorithm.kl_coef or lower trainer.lr"
    ),
    "value/explained_variance": Rule(below(0.0), "the critic predicts worse than a constant would", 10),
    "rollout/truncated_frac": Rule(
        above(0.8), "most responses hit the length limit; raise rollout.max_response_tokens"
    ),
    "mismatch/logprob_abs_mean": Rule(
        above(0.1), "trainer and sampler disagree about the same tokens; were the weights published?"
    ),
    "robust/skipped_steps": Rule(
        above(0),
        "an update was skipped: its loss or gradient was not finite, or no token counted in its loss",
    ),
    "robust/bad_rows": Rule(above(0), "rows of the dataset were dropped"),
}

CHOSEN = "dpo/logprob_chosen"
HALVED = 2.0  # times as many nats, and as many more, than a chosen answer cost at first: a warning
FALL = 0.05  # an evaluation this far below its best, while the training reward rose, is a warning


class MetricWatch:
    """Feeds on one record after the other; `update` returns the warnings that are new. Each is said once."""

    def __init__(self) -> None:
        self._bad_in_a_row: dict[str, int] = {}
        self._said: set[str] = set()
        self._reward: float | None = None
        self._first_chosen: float | None = None
        self._best: dict[
            str, tuple[float, float | None]
        ] = {}  # evaluation: (best value, training reward then)

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """`metrics` is one step's record without step and stage. Returns sentences that begin with the
        metric's name."""
        reward = metrics.get("reward/mean")
        if reward is not None and math.isfinite(reward):
            self._reward = reward
        found = []
        for name, value in metrics.items():
            for key, sentence in self._judge(name, value):
                if key not in self._said:
                    self._said.add(key)
                    found.append(f"{name} = {value:.4g}: {sentence}")
        return found

    def _judge(self, name: str, value: float) -> list[tuple[str, str]]:
        if not math.isfinite(value):
            return [(f"{name} non-finite", "not a finite number")]
        if name.startswith("eval/") and "/pass@" in name:
            return self._judge_evaluation(name, value)
        if name == CHOSEN:
            return self._judge_chosen(value)
        rule = RULES.get(name)
        if rule is None:
            return []
        self._bad_in_a_row[name] = self._bad_in_a_row.get(name, 0) + 1 if rule.is_bad(value) else 0
        return [(name, rule.sentence)] if self._bad_in_a_row[name] >= rule.in_a_row else []

    def _judge_chosen(self, value: float) -> list[tuple[str, str]]:
        if self._first_chosen is None:
            self._first_chosen = value
        if value >= HALVED * (self._first_chosen - 1.0):
            return []
        sentence = (
            f"the chosen answers were at {self._first_chosen:.4g}: the policy leaves them together with the rejected ones; "
            "lower trainer.lr, raise preference.beta, or set preference.nll_coef"
        )
        return [(CHOSEN, sentence)]

    def _judge_evaluation(self, name: str, value: float) -> list[tuple[str, str]]:
        best, reward_then = self._best.get(name, (-math.inf, None))
        if value > best:
            self._best[name] = (value, self._reward)
            return []
        rose = reward_then is not None and self._reward is not None and self._reward > reward_then
        if rose and value < best - FALL:
            return [
                (
                    name,
                    f"it fell from {best:.4g} while the training reward rose: overfitting or reward hacking",
                )
            ]
        return []
