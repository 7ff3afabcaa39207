"""Held-out evaluation: the same prompts and the same random numbers every time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf.batching import in_batches, make_preference_batch
from rlhf.data import PromptDataset
from rlhf.pass_at_k import majority, pass_at_k
from rlhf.preference import compares_means
from rlhf.recipe import rules
from rlhf.recipe.schema import EvaluationConfig
from rlhf.records import Batch, Rollout, RolloutGroup
from rlhf.reward import Scorer
from rlhf.reward_loss import accuracy_interval
from rlhf.rollout import SamplingParams
from rlhf.sequences import sequence_lengths, sequence_logprobs
from rlhf.trainers.roles import Sampler

if TYPE_CHECKING:
    from rlhf.trainers.stage import Stage

LOWER_IS_BETTER = frozenset(
    {"loss", "perplexity", "truncated_frac", "reward_undesirable"}
)  # of `eval/<set>/...`


def evaluate(
    name: str,
    prompts: PromptDataset,
    sampler: Sampler,
    scorer: Scorer,
    config: EvaluationConfig,
    *,
    params: SamplingParams,
) -> tuple[dict[str, float], list[Rollout]]:
    """Sample `config.samples` responses to every prompt, score them, and count.

    Returns the metrics `eval/<name>/...` and the scored rollouts. The seed is a function of the set's name and the prompt
    alone, so that two evaluations differ by the weights only.
    """
    groups = sampler.generate(
        [prompts[i] for i in range(len(prompts))],
        params,
        samples=config.samples,
        purpose=f"eval/{name}",
        step=0,
    )
    rollouts = scorer.score([r for group in groups for r in group.rollouts])
    return eval_metrics(name, rollouts, config, extract=scorer.answer_of), rollouts


def eval_metrics(
    name: str,
    rollouts: Sequence[Rollout],
    config: EvaluationConfig,
    *,
    extract: Callable[[str], Hashable | None] | None = None,
) -> dict[str, float]:
    """pass@1, pass@k, maj@n, mean reward and truncation of scored rollouts, n = `config.samples` in a row for each prompt.

    pass@1 is the mean over all responses, which is also called mean@n; pass@k, for each k of `config.ks`, is the
    unbiased estimate from n; maj@n the share of prompts whose most frequent answer, as `extract` reads it, passes. A
    response whose reward is missing did not pass.
    """
    n = config.samples
    passed = np.array([r.reward is not None and r.reward > config.correct_above for r in rollouts]).reshape(
        -1, n
    )
    rewards = [r.reward for r in rollouts if r.reward is not None]
    metrics = {
        "pass@1": float(passed.mean()),
        "reward_mean": float(np.mean(rewards)) if rewards else float("nan"),
        "truncated_frac": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }
    if n > 1:
        metrics[f"mean@{n}"] = metrics["pass@1"]
        metrics |= {f"pass@{k}": pass_at_k(passed.sum(axis=1), n, k) for k in config.ks or [n] if k > 1}
    if n > 1 and extract is not None:
        answers = [extract(r.response_text) for r in rollouts]
        chosen = [majority(answers[i * n : (i + 1) * n]) for i in range(len(passed))]
        metrics[f"maj@{n}"] = float(
            np.mean([j is not None and row[j] for j, row in zip(chosen, passed, strict=True)])
        )
    return {f"eval/{name}/{metric}": value for metric, value in metrics.items()}


def evaluate_pairs(name: str, pairs: Any, stage: Stage) -> dict[str, float]:
    """How often the chosen answer scores higher than the rejected one, with a 95 % interval, and by how much.

    The score is a reward model's, or for a policy beta times its log-ratio to the reference (its log-prob where nothing
    compares with a reference), summed or per token as its losses compare; sft has the mean log-prob per token.
    `eval/<name>/{accuracy,accuracy_low,accuracy_high,margin}`; equal scores count half.
    """
    scores = []
    for batch in in_batches(pairs, make_preference_batch):
        scores.append(_scores(stage, stage.with_reference(batch)))
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
        recipe, means = stage.recipe, False
        scores = sequence_logprobs(stage.actor.score(batch), batch.loss_mask)
        if batch.ref_logprobs is not None:
            scores = scores - sequence_logprobs(batch.ref_logprobs, batch.loss_mask)
        if recipe.method == "kto":
            beta = recipe.kto.beta
        else:
            settings = rules.decided_preference(recipe)
            beta, means = settings.beta, recipe.method == "sft" or compares_means(settings.losses)
        scores = beta * (scores / sequence_lengths(batch.loss_mask) if means else scores)
    return (scores[0::2] - scores[1::2]).float()


def group_numbers(groups: Sequence[RolloutGroup]) -> list[int]:
    """For every rollout of `flatten`, which of the groups it is of."""
    return [number for number, group in enumerate(groups) for _ in group.rollouts]


def flatten(groups: Sequence[RolloutGroup]) -> list[Rollout]:
    """The rollouts of all groups, in order."""
    return [rollout for group in groups for rollout in group.rollouts]
