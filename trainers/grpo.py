"""GRPO and its family (arXiv 2402.03300): sample groups, score them, compare within the group, update.

The loop is the straight line of docs/architecture.md. Advantages are in `rlhf.advantages`, the objective, KL and
aggregation in `rlhf.objectives`, `rlhf.kl` and `rlhf.aggregate`.
"""

from __future__ import annotations

from rlhf.advantages import with_advantages
from rlhf.batching import make_batch, split_minibatches
from rlhf.trainers.evaluate import flatten
from rlhf.trainers.stage import Stage


def train_grpo(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, publishes, evaluates, tracks and saves around them."""
    r, algorithm = stage.recipe, stage.recipe.algorithm
    for step in stage.steps():
        prompts = stage.prompts(step)
        groups = stage.sampler.generate(
            prompts, stage.sampling, samples=r.rollout.group_size, purpose="rollout", step=step
        )
        rollouts = stage.scorer.score(flatten(groups))
        group_ids = [i for i, group in enumerate(groups) for _ in group.rollouts]
        batch = make_batch(rollouts, group_ids=group_ids, mask_truncated=algorithm.mask_truncated)
        batch = batch.replace(old_logprobs=stage.old_logprobs(batch))
        if stage.reference is not None:
            batch = batch.replace(ref_logprobs=stage.reference.score(batch))
        batch = with_advantages(batch, algorithm.advantage)

        updates = [
            stage.update(minibatch, "policy")
            for _ in range(r.trainer.passes_per_step)
            for minibatch in split_minibatches(batch, r.trainer.minibatches_per_step, by_groups=True)
        ]
        stage.publish()
        stage.track(step, rollouts=rollouts, batch=batch, updates=updates)
