"""Reward models: Bradley-Terry on preference pairs, and process rewards on labelled steps.

The losses are in `rlhf.reward_loss`. The result is a Hugging Face sequence-classification model with one label, which
every method with rewards takes as `reward_model.path`; a process reward model says in its configuration what ends a step,
and its steps' scores become a reward in `rlhf.trainers.process_reward`.
"""

from __future__ import annotations

from rlhf.batching import make_preference_batch, make_step_batch
from rlhf.trainers.reward_scale import store_scale
from rlhf.trainers.stage import Stage


def train_rm(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, evaluates, tracks and saves around them."""
    for step in stage.steps():
        batch = make_preference_batch(stage.next_rows())
        updates = [stage.update(part, "reward_model") for part in stage.minibatches(batch, by_groups=True)]
        stage.track(step, batch=batch, updates=updates)
    with stage.exported_weights():
        store_scale(stage)


def train_prm(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, evaluates, tracks and saves around them."""
    stage.actor.group.call("store_step_separator", stage.recipe.data.step_separator)
    for step in stage.steps():
        batch = make_step_batch(stage.next_rows())
        updates = [stage.update(part, "process_reward") for part in stage.minibatches(batch, by_groups=False)]
        stage.track(step, batch=batch, updates=updates)
