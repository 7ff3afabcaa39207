"""DPO and its family (arXiv 2305.18290): preference pairs, a reference, and a loss on sequence log-probs.

The losses are in `rlhf.preference`. Without a reference of its own a run compares with the actor's log-probs before
its first update, which are computed once and kept; `reference.update_every` makes it TR-DPO (2404.09656).
"""

from __future__ import annotations

from rlhf.batching import make_preference_batch
from rlhf.preference import COUPLED, with_baselines
from rlhf.recipe import rules
from rlhf.records import Batch
from rlhf.trainers.deepspeed_engine import UpdateStats
from rlhf.trainers.stage import Stage


def train_dpo(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, evaluates, tracks and saves around them."""
    stage.prepare_reference(make_preference_batch)
    for step in stage.steps():
        batch = stage.with_reference(make_preference_batch(stage.next_rows()))
        updates = preference_updates(stage, batch)
        stage.refresh_reference(step)
        stage.track(step, batch=batch, updates=updates)


def preference_updates(stage: Stage, batch: Batch) -> list[UpdateStats]:
    """The step's optimiser steps on its pairs. What couples pairs is taken over the whole minibatch first."""
    settings, updates = rules.decided_preference(stage.recipe), []
    for minibatch in stage.minibatches(batch, by_groups=True):
        if COUPLED & settings.losses.keys():
            minibatch = with_baselines(minibatch, stage.actor.score(minibatch), settings)
        updates.append(stage.update(minibatch, "preference"))
    return updates
