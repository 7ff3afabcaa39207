"""Supervised fine-tuning: the negative log-likelihood of the answers, over the step's global token count."""

from __future__ import annotations

from rlhf.batching import make_sft_batch, split_minibatches
from rlhf.trainers.stage import Stage


def train_sft(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, evaluates, tracks and saves around them."""
    trainer = stage.recipe.trainer
    for step in stage.steps():
        batch = make_sft_batch(stage.examples(step))
        updates = [
            stage.update(minibatch, "sft")
            for _ in range(trainer.passes_per_step)
            for minibatch in split_minibatches(batch, trainer.minibatches_per_step, by_groups=False)
        ]
        stage.track(step, batch=batch, updates=updates)
