"""Rejection sampling (best-of-n fine-tuning, RAFT, arXiv 2304.06767): sample, keep the best, imitate them.

What was kept is also written to the stage's selected.jsonl, one row for each response: prompt, response, reward, step (of
the stage). A later stage learns from it with `data.path: stage:NAME`; with `online.train: false` this one only selects.

A policy that always gives the best of n of its own responses is at most log n - (n - 1) / n nats from itself
(2112.09332): the metric rollout/best_of_n_kl says this bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from rlhf.batching import SftExample, make_sft_batch
from rlhf.recipe.outputs import SELECTED_FILE
from rlhf.records import Batch, Rollout, RolloutGroup
from rlhf.runlog import RecordFile
from rlhf.trainers.deepspeed_engine import UpdateStats
from rlhf.trainers.evaluate import flatten
from rlhf.trainers.rounds import scored_groups
from rlhf.trainers.stage import Stage


def train_rejection(stage: Stage) -> None:
    """Run the stage's remaining steps; `stage` resumes, publishes, evaluates, tracks and saves around them."""
    online, size = stage.recipe.online, stage.recipe.rollout.group_size
    with closing(open_selected(stage)) as selected:
        for step in stage.steps():
            groups = scored_groups(stage, step)
            best = select_best(groups, keep=online.keep_best, min_reward=online.min_reward)
            selected.append(as_record(rollout, step + 1) for rollout in best)
            selected.sync()  # before the checkpoint that covers it
            batch, updates = imitate(stage, best) if best and online.train else (None, [])
            stage.note({"rollout/selected_frac": len(best) / len(flatten(groups))})
            if online.min_reward is None:  # what passes a bar may be as far away as passing is rare
                stage.note({"rollout/best_of_n_kl": math.log(size) - (size - 1) / size})
            stage.publish()
            stage.track(step, rollouts=flatten(groups), batch=batch, updates=updates)


def open_selected(stage: Stage) -> RecordFile:
    """The stage's record of what it selected, cut back to the steps that are behind it."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    return RecordFile(stage.folder / SELECTED_FILE, keep_through=stage.progress.step)


def imitate(stage: Stage, best: Sequence[Rollout]) -> tuple[Batch, list[UpdateStats]]:
    batch = make_sft_batch([as_example(rollout) for rollout in best])
    return batch, [stage.update(part, "sft") for part in stage.minibatches(batch, by_groups=False)]


def select_best(groups: Sequence[RolloutGroup], *, keep: int, min_reward: float | None) -> list[Rollout]:
    """Of each group the `keep` responses of the highest reward (the earlier of two equal ones), none of them below
    `min_reward`, without a reward, cut off, or twice the same."""
    selected = []
    for group in groups:
        seen: set[tuple[int, ...]] = set()
        fit = []
        for rollout in group.rollouts:
            good = rollout.reward is not None and (min_reward is None or rollout.reward >= min_reward)
            if good and rollout.finish_reason == "stop" and rollout.response_ids not in seen:
                seen.add(rollout.response_ids)
                fit.append(rollout)
        selected += sorted(fit, key=lambda r: -r.reward)[:keep]
    return selected


def as_example(rollout: Rollout) -> SftExample:
    return SftExample(
        id=rollout.sample_id, prompt_ids=rollout.prompt.token_ids, response_ids=rollout.response_ids
    )


def as_record(rollout: Rollout, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": rollout.prompt.text,
        "response": rollout.response_text,
        "reward": rollout.reward,
    }
