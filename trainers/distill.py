"""Distillation: the student imitates a teacher's distribution, on the data's answers or on its own responses.

Offline distillation (1503.02531) and GKD (arXiv 2306.13649): `distill.on_policy_frac` of the steps learn from the
student's own responses, without the NLL of `distill.nll_coef`, which is the data's. With divergence sampled_kl the
reverse KL of each sampled token is the advantage of a policy gradient. The divergences are in `rlhf.divergence`: of the
teacher's likeliest tokens, or with `distill.top_k: all` of whole distributions, whose logits the update asks the
teacher beside it for.
"""

from __future__ import annotations

from rlhf import rng
from rlhf.batching import make_batch, make_sft_batch
from rlhf.divergence import distill_advantages
from rlhf.records import Batch
from rlhf.trainers.evaluate import flatten, group_numbers
from rlhf.trainers.stage import Stage


def train_distill(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, publishes, evaluates, tracks and saves around them."""
    d = stage.recipe.distill
    for step in stage.steps():
        rollouts = None
        if rng.generator(stage.recipe.run.seed, "on-policy step", step).random() < d.on_policy_frac:
            groups = stage.generate(stage.next_rows(stage.prompt_data), step)
            rollouts = flatten(groups)
            group_ids = group_numbers(groups)
            batch = make_batch(rollouts, group_ids=group_ids, needs_reward=False)
        else:
            batch = make_sft_batch(stage.next_rows())
        if d.divergence == "sampled_kl":
            loss, taught = "policy", with_teacher_advantages(stage, batch)
            stage.note({"distill/divergence": -float(taught.advantages[batch.loss_mask].mean())})
        else:
            loss = "distill" if rollouts is None else "distill_own"
            taught = batch if d.top_k == "all" else stage.teacher.top(batch)
        updates = [stage.update(part, loss) for part in stage.minibatches(taught, by_groups=False)]
        stage.publish()
        stage.track(step, rollouts=rollouts, batch=batch, updates=updates)


def with_teacher_advantages(stage: Stage, batch: Batch) -> Batch:
    """The batch with A_t = log teacher - log student on the student's own tokens."""
    old = stage.actor.score(batch)
    advantages = distill_advantages(old, stage.teacher.score(batch), batch.response_mask)
    return batch.replace(old_logprobs=old, advantages=advantages)
