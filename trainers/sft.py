"""Supervised fine-tuning: the negative log-likelihood of the answers, over the step's global token count."""

from __future__ import annotations

from rlhf.batching import make_sft_batch
from rlhf.trainers.stage import Stage


def train_sft(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, evaluates, tracks and saves around them."""
    for step in stage.steps():
        batch = make_sft_batch(stage.next_rows())
        updates = [stage.update(part, "sft") for part in stage.minibatches(batch, by_groups=False)]
        stage.track(step, batch=batch, updates=updates)
