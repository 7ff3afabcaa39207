"""The part of the reward that a trained reward model gives: of whole responses, or of their steps.

A process reward model says how likely each step is to be right. The reward is the smallest of these probabilities
(Math-Shepherd, arXiv 2312.08935), their product (2305.20050), or the last one. Not here: how such a model is trained
(`rlhf.trainers.rm`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from rlhf.batching import StepExample, make_step_batch
from rlhf.recipe.schema import RewardModelConfig
from rlhf.records import Rollout
from rlhf.trainers.rewarding import ModelPart, reward_model_part
from rlhf.trainers.roles import RewardModel


def model_part(config: RewardModelConfig, model: RewardModel, tokenizer: Any) -> ModelPart:
    """What the reward model of the recipe adds. Raises ValueError for a setting that does not fit the model."""
    separator = model.step_separator()
    if separator is None and config.steps is not None:
        raise ValueError(
            f"reward_model.steps={config.steps!r}: {config.path} judges whole responses (its config.json has no "
            "step_separator); leave it out, or give a model that method: prm trained"
        )
    if separator is None:
        return reward_model_part(model, weight=config.weight)
    if config.normalize:
        raise ValueError(
            f"reward_model.normalize: {config.path} gives probabilities of steps, which have no scale to be divided by; "
            "leave it out"
        )
    if not separator:
        raise ValueError(
            f"reward_model.path={config.path} was trained with an empty step_separator, so that responses cannot be cut "
            "into steps as it reads them; train it with data.step_separator set to what ends every step"
        )

    def encode(text: str) -> Sequence[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return process_reward_part(
        model, encode, separator=separator, steps=config.steps or "min", weight=config.weight
    )


def process_reward_part(
    model: RewardModel, encode: Callable[[str], Sequence[int]], *, separator: str, steps: str, weight: float
) -> ModelPart:
    """A process reward model's verdict on every step, as one number of the response; `steps` is a name in `OF_STEPS`."""
    reduce = OF_STEPS[steps]

    def score(rollouts: Sequence[Rollout]) -> list[float]:
        batch = make_step_batch([in_steps(r, encode, separator) for r in rollouts])
        scores = model.step_scores(batch)
        return [
            float(reduce(logsigmoid(row[mask].double()).exp())) for row, mask in zip(scores, batch.loss_mask)
        ]

    return ModelPart("reward_model", weight, score)


OF_STEPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "min": torch.min,
    "product": torch.prod,
    "last": lambda probabilities: probabilities[-1],
}


def in_steps(rollout: Rollout, encode: Callable[[str], Sequence[int]], separator: str) -> StepExample:
    """The response as its judge was taught to read it: cut at `separator`, each step followed by it and tokenised apart
    (`rlhf.data.steps`). Steps without text are left out; a response without any is one empty step."""
    texts = [step for step in rollout.response_text.split(separator) if step.strip()] or [""]
    pieces = [tuple(encode(step + separator)) for step in texts]
    ends = tuple(end - 1 for end in accumulate(map(len, pieces)))
    response_ids = tuple(token for piece in pieces for token in piece)
    return StepExample(rollout.sample_id, rollout.prompt.token_ids, response_ids, ends, (0.0,) * len(ends))
