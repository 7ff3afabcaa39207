"""Reward models: Bradley-Terry on preference pairs, and process rewards on labelled steps.

The losses are in `rlhf.reward_loss`. The result is a Hugging Face sequence-classification model with one label; ppo
and grpo take it as `reward_model.path`.
"""

from __future__ import annotations

from rlhf.batching import make_preference_batch, make_step_batch
from rlhf.trainers.stage import Stage

_SCALE_PAIRS = 512


def train_rm(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, evaluates, tracks and saves around them."""
    for step in stage.steps():
        batch = make_preference_batch(stage.next_rows())
        updates = [stage.update(part, "reward_model") for part in stage.minibatches(batch, by_groups=True)]
        stage.track(step, batch=batch, updates=updates)
    store_scale(stage)


def store_scale(stage: Stage) -> None:
    """Note the mean and spread of the model's scores with it, for `reward_model.normalize`: those of the first
    training pairs, chosen and rejected alike."""
    rows = [stage.data[i] for i in range(min(len(stage.data), _SCALE_PAIRS))]
    scores = stage.actor.rewards(make_preference_batch(rows)).double()
    stage.actor.group.call("store_reward_scale", scores.mean().item(), scores.std().item())


def train_prm(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, evaluates, tracks and saves around them."""
    for step in stage.steps():
        batch = make_step_batch(stage.next_rows())
        updates = [stage.update(part, "process_reward") for part in stage.minibatches(batch, by_groups=False)]
        stage.track(step, batch=batch, updates=updates)
