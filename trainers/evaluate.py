"""Held-out evaluation: the same prompts and the same random numbers every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf.batching import make_preference_batch
from rlhf.data import PromptDataset
from rlhf.recipe.schema import EvaluationConfig
from rlhf.records import Batch, Rollout, RolloutGroup
from rlhf.reward import Scorer
from rlhf.reward_loss import accuracy_interval
from rlhf.rollout import SamplingParams
from rlhf.sequences import sequence_lengths, sequence_logprobs
from rlhf.trainers.roles import Sampler

if TYPE_CHECKING:
    from rlhf.trainers.stage import Stage

_PAIRS_AT_ONCE = 256


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


def evaluate_pairs(name: str, pairs: Any, stage: Stage) -> dict[str, float]:
    """How often the chosen answer scores higher than the rejected one, with a 95 % interval, and by how much.

    The score is a reward model's, or for a policy beta times its log-ratio to the reference (its mean log-prob per token
    where nothing compares with a reference). `eval/<name>/{accuracy,accuracy_low,accuracy_high,margin}`; equal scores
    count half.
    """
    scores = []
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        rows = [pairs[i] for i in range(start, min(start + _PAIRS_AT_ONCE, len(pairs)))]
        scores.append(_scores(stage, stage.with_reference(make_preference_batch(rows))))
    gaps = torch.cat(scores)
    right = float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
    low, high = accuracy_interval(right, len(gaps))
    return {
        f"eval/{name}/accuracy": right / len(gaps),
        f"eval/{name}/accuracy_low": low,
        f"eval/{name}/accuracy_high": high,
        f"eval/{name}/margin": float(gaps.mean()),
    }


def _scores(stage: Stage, batch: Batch) -> torch.Tensor:
    """(P,) fp32: score of chosen - score of rejected."""
    if stage.recipe.method == "rm":
        scores = stage.actor.rewards(batch)
    else:
        scores = sequence_logprobs(stage.actor.score(batch), batch.loss_mask)
        if batch.ref_logprobs is None:
            scores = scores / sequence_lengths(batch.loss_mask)
        else:
            scores = scores - sequence_logprobs(batch.ref_logprobs, batch.loss_mask)
        scores = stage.recipe.preference.beta * scores
    return (scores[0::2] - scores[1::2]).float()


def flatten(groups: Sequence[RolloutGroup]) -> list[Rollout]:
    """The rollouts of all groups, in order."""
    return [rollout for group in groups for rollout in group.rollouts]
