"""Held-out evaluation: the same prompts and the same random numbers every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf.data import PromptDataset
from rlhf.recipe.schema import EvaluationConfig
from rlhf.records import Rollout, RolloutGroup
from rlhf.reward import Scorer
from rlhf.rollout import SamplingParams
from rlhf.trainers.roles import Sampler


def evaluate(
    name: str, prompts: PromptDataset, sampler: Sampler, scorer: Scorer, config: EvaluationConfig, *, params: SamplingParams
) -> tuple[dict[str, float], list[Rollout]]:
    """Sample `config.samples` responses to every prompt, score them, and count.

    Returns the metrics `eval/<name>/...` and the scored rollouts. The seed is a function of the set's name and the prompt
    alone, so that two evaluations differ by the weights only.
    """
    groups = sampler.generate(
        [prompts[i] for i in range(len(prompts))], params, samples=config.samples, purpose=f"eval/{name}", step=0
    )
    rollouts = scorer.score([r for group in groups for r in group.rollouts])
    return eval_metrics(name, rollouts, config.samples, config.correct_above), rollouts


def eval_metrics(name: str, rollouts: Sequence[Rollout], samples: int, correct_above: float) -> dict[str, float]:
    """pass@1, pass@k, mean reward and truncation of scored rollouts, `samples` in a row for each prompt.

    pass@1 is the mean over all responses; pass@k the share of prompts with at least one pass among the k = `samples`
    drawn (the unbiased estimator of 2107.03374 for n = k). A response whose reward is missing did not pass.
    """
    passed = np.array([r.reward is not None and r.reward > correct_above for r in rollouts]).reshape(-1, samples)
    rewards = [r.reward for r in rollouts if r.reward is not None]
    metrics = {
        f"eval/{name}/pass@1": float(passed.mean()),
        f"eval/{name}/reward_mean": float(np.mean(rewards)) if rewards else float("nan"),
        f"eval/{name}/truncated_frac": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }
    if samples > 1:
        metrics[f"eval/{name}/pass@{samples}"] = float(passed.any(axis=1).mean())
    return metrics


def flatten(groups: Sequence[RolloutGroup]) -> list[Rollout]:
    """The rollouts of all groups, in order."""
    return [rollout for group in groups for rollout in group.rollouts]
