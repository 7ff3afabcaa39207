"""GRPO and its family (arXiv 2402.03300): sample groups, score them, compare within the group, update.

The loop is the straight line of docs/architecture.md. Advantages are in `rlhf.advantages`, the objective, KL and
aggregation in `rlhf.objectives`, `rlhf.kl` and `rlhf.aggregate`. Which of the family it is (GRPO, Dr.GRPO, DAPO, GSPO,
CISPO, RLOO, REINFORCE++, ReMax, ...) is said by the recipe's `algorithm` section.
"""

from __future__ import annotations

from rlhf.advantages import with_advantages
from rlhf.batching import make_batch
from rlhf.trainers.evaluate import flatten, group_numbers
from rlhf.trainers.rounds import scored_groups
from rlhf.trainers.stage import Stage


def train_grpo(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, publishes, evaluates, tracks and saves around them."""
    algorithm = stage.recipe.algorithm
    for step in stage.steps():
        fresh = scored_groups(stage, step)
        groups = [*fresh, *stage.replayed(fresh, step)]
        rollouts = flatten(groups)
        group_ids = group_numbers(groups)
        batch = make_batch(
            rollouts,
            group_ids=group_ids,
            mask_truncated=algorithm.mask_truncated,
            correct_above=algorithm.correct_above,
        )
        batch = stage.scored(batch)
        if algorithm.advantage == "remax":
            batch = batch.replace(baselines=stage.greedy_rewards(groups, step))
        batch = with_advantages(batch, stage.policy_settings)
        batch = stage.with_covariance(batch, step)

        updates = []
        for minibatch in stage.minibatches(batch, by_groups=True):
            if not stage.moved_enough(updates):
                updates.append(stage.update(minibatch, "policy"))
        stage.publish()
        stage.refresh_reference(step)
        stage.track(
            step,
            rollouts=flatten(fresh),
            replayed=rollouts[len(flatten(fresh)) :],
            batch=batch,
            updates=updates,
        )
