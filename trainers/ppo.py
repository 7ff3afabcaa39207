"""PPO (arXiv 1707.06347) with a critic, of its own or on the actor's trunk: sample, score, estimate advantages per token,
update both.

Token rewards, generalised advantage estimation and whitening are in `rlhf.advantages`, the clipped objective in
`rlhf.objectives`, the critic's loss in `rlhf.value`.
"""

from __future__ import annotations

from rlhf.advantages import with_gae
from rlhf.batching import make_batch
from rlhf.trainers.evaluate import flatten, group_numbers
from rlhf.trainers.stage import Stage


def train_ppo(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, publishes, evaluates, tracks and saves around them."""
    r, a = stage.recipe, stage.recipe.algorithm
    loss = "policy_and_value" if r.shares_trunk else "policy"
    for step in stage.steps():
        groups = stage.generate(stage.next_rows(), step)
        rollouts = stage.reward(flatten(groups))
        group_ids = group_numbers(groups)
        batch = make_batch(
            rollouts, group_ids=group_ids, mask_truncated=a.mask_truncated, correct_above=a.correct_above
        )
        batch = stage.scored(batch)
        batch = with_gae(batch, stage.policy_settings)
        batch = stage.with_covariance(batch, step)

        updates, critic_updates = [], []
        for minibatch in stage.minibatches(batch, by_groups=False):
            if stage.critic is not None:
                critic_updates.append(stage.update_critic(minibatch))
            if step >= r.critic.pretrain_steps and not stage.moved_enough(updates):
                updates.append(stage.update(minibatch, loss))
        stage.publish()
        stage.refresh_reference(step)
        stage.track(step, rollouts=rollouts, batch=batch, updates=updates, critic_updates=critic_updates)
