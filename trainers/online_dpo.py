"""DPO on sampled responses: online and iterative DPO (arXiv 2402.04792), and SPIN (2401.01335).

Every step samples a group for each prompt. Of the policy's own responses the best against the worst is a pair; SPIN
(`online.pairs: gold`) sets the row's own answer against each response of its opponent, the reference of the iteration.
`reference.update_every` starts a new iteration of either. With losses that compare with no reference SPIN's opponent is
the policy itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.batching import PreferenceExample, make_preference_batch
from rlhf.records import RolloutGroup
from rlhf.trainers.dpo import preference_updates
from rlhf.trainers.evaluate import flatten
from rlhf.trainers.rounds import scored_groups
from rlhf.trainers.stage import Stage


def train_online_dpo(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, publishes, evaluates, tracks and saves around them."""
    online = stage.recipe.online
    for step in stage.steps():
        groups = scored_groups(stage, step)
        if online.pairs == "gold":
            pairs = gold_pairs(groups, stage.gold)
        else:
            pairs = best_worst_pairs(groups, min_gap=online.min_gap)
        rollouts = flatten(groups)
        stage.note({"dpo/pairs": float(len(pairs))})
        batch, updates = None, []
        if pairs:
            batch = stage.with_reference(make_preference_batch(pairs))
            updates = preference_updates(stage, batch)
        if stage.opponent is None:
            stage.publish()
        stage.refresh_reference(step)
        stage.track(step, rollouts=rollouts, batch=batch, updates=updates)


def best_worst_pairs(groups: Sequence[RolloutGroup], *, min_gap: float) -> list[PreferenceExample]:
    """Of each group the response of the highest reward against that of the lowest (the earlier of equal ones), with
    the difference as margin. Groups whose rewards differ by no more than `min_gap` give none."""
    pairs = []
    for group in groups:
        scored = [r for r in group.rollouts if r.reward is not None]
        if len(scored) < 2:
            continue
        best, worst = max(scored, key=lambda r: r.reward), min(scored, key=lambda r: r.reward)
        gap = best.reward - worst.reward
        if gap > min_gap and best.response_ids != worst.response_ids:
            ids = (best.response_ids, worst.response_ids)
            pairs.append(PreferenceExample(best.sample_id, group.prompt.token_ids, *ids, margin=gap))
    return pairs


def gold_pairs(
    groups: Sequence[RolloutGroup], gold: Mapping[str, tuple[int, ...]]
) -> list[PreferenceExample]:
    """The row's own answer against each of the group's responses that differs from it (SPIN)."""
    return [
        PreferenceExample(
            r.sample_id, group.prompt.token_ids, gold[group.prompt.id], r.response_ids, margin=None
        )
        for group in groups
        if group.prompt.id in gold  # an answer that is too long was left out
        for r in group.rollouts
        if r.response_ids and r.response_ids != gold[group.prompt.id]
    ]
