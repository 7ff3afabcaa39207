"""KTO (arXiv 2402.01306) and BCO (2404.04656): answers that are desirable or not, without pairs.

The losses are in `rlhf.kto`. KTO's z0 is estimated from answers put under other rows' prompts, over the whole minibatch,
under the weights of the update that uses it.
"""

from __future__ import annotations

from rlhf.batching import make_label_batch
from rlhf.kto import mismatched, with_bco_baseline, with_kto_baseline
from rlhf.records import Batch
from rlhf.trainers.stage import Stage


def train_kto(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, evaluates, tracks and saves around them."""
    for step in stage.steps():
        batch = stage.with_reference(make_label_batch(stage.next_rows()))
        updates = [
            stage.update(with_baseline(stage, minibatch), "kto")
            for minibatch in stage.minibatches(batch, by_groups=False)
        ]
        stage.refresh_reference(step)
        stage.track(step, batch=batch, updates=updates)


def with_baseline(stage: Stage, batch: Batch) -> Batch:
    """The batch with what the loss compares every row with, under the weights that the update starts from."""
    if stage.recipe.kto.loss == "bco":
        return with_bco_baseline(batch, stage.actor.score(batch))
    others = mismatched(batch, max_tokens=stage.context)
    others = others.replace(ref_logprobs=stage.reference.score(others))
    return with_kto_baseline(batch, others, stage.actor.score(others))
