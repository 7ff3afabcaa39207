"""What a stage does around its loop, with an actor that only says how each update ended."""

from __future__ import annotations

import io
import math

import pytest
import torch

from rlhf.console import Console
from rlhf.recipe.load import plan_from_dict
from rlhf.records import Batch
from rlhf.tracking import Tracker
from rlhf.trainers.deepspeed_engine import UpdateStats
from rlhf.trainers.metrics import update_metrics
from rlhf.trainers.roles import Clock
from rlhf.trainers.stage import Stage, TrainingStopped

GOOD = UpdateStats(loss=1.0, grad_norm=1.0, lr=0.1, skipped=False, sums={"num_tokens": torch.tensor(2.0)})
BAD = UpdateStats(
    loss=math.nan, grad_norm=math.nan, lr=0.1, skipped=True, sums={"num_tokens": torch.tensor(2.0)}
)
EMPTY = UpdateStats(loss=0.0, grad_norm=0.0, lr=0.1, skipped=True, sums={}, empty=True)
RECIPE = {
    "method": "sft",
    "model": {"path": "none"},
    "data": {"path": "none", "response_column": "answer"},
    "trainer": {"steps": 9},
    "tracking": {"wandb": "off"},
}


class _Actor:
    """Answers updates from a list."""

    def __init__(self, outcomes: list[UpdateStats]) -> None:
        self._outcomes = iter(outcomes)

    def update(self, *parts: tuple[Batch, str], **changing: float) -> UpdateStats:
        return next(self._outcomes)


def stage_of(outcomes: list[UpdateStats], folder) -> tuple[Stage, io.StringIO]:
    output = io.StringIO()
    recipe = plan_from_dict(RECIPE).stages[0].recipe
    tracker = Tracker(
        folder,
        recipe.tracking,
        run_name="test",
        resolved_recipe={},
        resume_step=None,
        console=Console(file=output, interactive=False),
    )
    stage = Stage(
        name="sft",
        recipe=recipe,
        folder=folder,
        offset=0,
        total_steps=9,
        data=None,
        eval_sets={},
        eval_pairs={},
        actor=_Actor(outcomes),
        tracker=tracker,
        clock=Clock(),
        sampling=None,
        eval_sampling=None,
    )
    return stage, output


def test_empty_steps_are_skipped_and_counted_but_stop_nothing(tmp_path):
    """Would catch: a stop after three batches whose rewards were all missing, or three bad losses with empty steps
    between them that do not stop the run."""
    stage, output = stage_of([GOOD, EMPTY, EMPTY, EMPTY, EMPTY, BAD, GOOD], tmp_path)
    for _ in range(7):
        stage.update(None, "sft")
    assert (stage.progress.version, stage.progress.skipped, stage.progress.skipped_in_a_row) == (2, 5, 0)
    said = " ".join(output.getvalue().split())
    assert said.count("no token counts in its loss") == 1 and said.count("was not finite") == 1
    stage, _ = stage_of([BAD, EMPTY, BAD, EMPTY, BAD], tmp_path)
    for _ in range(4):
        stage.update(None, "sft")
    with pytest.raises(TrainingStopped, match="3 updates of the actor in a row had a non-finite loss"):
        stage.update(None, "sft")


def test_numbers_of_a_step_with_empty_updates_are_those_of_the_others():
    """Would catch: a crash of a step in which one of several minibatches, or every one, has no token to learn from."""
    token = {
        "num_tokens": torch.tensor(2.0),
        "policy/loss": torch.tensor(0.5),
        "policy/entropy": torch.tensor(3.0),
    }
    full = UpdateStats(loss=0.5, grad_norm=2.0, lr=0.1, skipped=False, sums=token)
    want = {"policy/loss": 0.5, "policy/entropy": 1.5, "policy/lr": 0.1}
    assert update_metrics([full, EMPTY]) == want | {"policy/grad_norm": 0.0}
    assert update_metrics([EMPTY, full]) == want | {"policy/grad_norm": 2.0}
    assert update_metrics([EMPTY]) == {"policy/grad_norm": 0.0, "policy/lr": 0.1}
