"""The scale of a reward model's scores, which is stored with it for `reward_model.normalize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.batching import make_preference_batch

if TYPE_CHECKING:
    from rlhf.trainers.stage import Stage

_PAIRS = 512


def store_scale(stage: Stage) -> None:
    """Note the mean and spread of the actor's scores with it: those of the first training pairs, chosen and rejected
    alike. To be called under the weights that will be exported."""
    rows = [stage.data[i] for i in range(min(len(stage.data), _PAIRS))]
    scores = stage.actor.rewards(make_preference_batch(rows)).double()
    stage.actor.group.call("store_reward_scale", scores.mean().item(), scores.std().item())
