"""What a stage does around its loop, with an actor that only says how each update ended."""

from __future__ import annotations

import io
import math

import pytest
import torch

from rlhf.console import Console
from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import RewardConfig
from rlhf.records import Batch, Prompt, Rollout, RolloutGroup
from rlhf.reward import Scorer
from rlhf.tracking import Tracker
from rlhf.trainers.deepspeed_engine import UpdateStats
from rlhf.trainers.evaluate import flatten
from rlhf.trainers.metrics import update_metrics
from rlhf.trainers.roles import Clock
from rlhf.trainers.rounds import scored_groups
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
RL = RECIPE | {
    "method": "grpo",
    "data": {"path": "none"},
    "reward": [{"function": "gsm8k"}],
    "rollout": {"group_size": 2, "max_response_tokens": 8},
}


class _Actor:
    """Answers updates from a list."""

    def __init__(self, outcomes: list[UpdateStats]) -> None:
        self._outcomes = iter(outcomes)

    def update(self, *parts: tuple[Batch, str], **changing: float) -> UpdateStats:
        return next(self._outcomes)


class _Data:
    """Prompts whose answer is 7."""

    counts = {"bad_rows": 0}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Prompt:
        return Prompt(id=f"p{i}", token_ids=(1,), text="?", row={"answer": "#### 7"})


def response(text: str, *, tokens: int = 2, prompt: Prompt | None = None) -> Rollout:
    versions = (0,) * tokens
    return Rollout(
        "0", prompt or _Data()[0], (2,) * tokens, (True,) * tokens, (0.0,) * tokens, versions, "stop", text
    )


class _Sampler:
    """Gives a list of groups, each a list of (text, number of tokens), one group a prompt, in order."""

    def __init__(self, groups: list[list[tuple[str, int]]]) -> None:
        self._groups = iter(groups)

    def generate(self, prompts, params, **how) -> list[RolloutGroup]:
        return [
            RolloutGroup(p, tuple(response(t, tokens=n, prompt=p) for t, n in next(self._groups)))
            for p in prompts
        ]


def stage_of(
    outcomes: list[UpdateStats], folder, recipe: dict | None = None, **more
) -> tuple[Stage, io.StringIO]:
    output = io.StringIO()
    recipe = plan_from_dict(recipe or RECIPE).stages[0].recipe
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
        data=_Data(),
        eval_sets={},
        eval_pairs={},
        actor=_Actor(outcomes),
        tracker=tracker,
        clock=Clock(),
        sampling=None,
        eval_sampling=None,
        **more,
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


def test_the_kl_weight_follows_no_kl_that_is_not_a_number(tmp_path):
    """Would catch: a run with kl_target that one skipped update ends, or whose weight is NaN from then on."""
    adapting = RL | {"algorithm": {"kl_coef": 0.1, "kl_target": 1.0, "kl_horizon": 10.0}}
    stage, _ = stage_of([], tmp_path, adapting)
    for kl, want in ((math.nan, 0.1), (math.inf, 0.1), (5.0, 0.1 * 1.02)):
        bad = UpdateStats(
            loss=kl,
            grad_norm=kl,
            lr=0.1,
            skipped=not math.isfinite(kl),
            sums={"num_tokens": torch.tensor(1.0), "policy/kl_ref": torch.tensor(kl)},
        )
        stage.track(0, updates=[bad], batch=None, rollouts=[response("a")])
        assert stage.progress.kl_coef == pytest.approx(want)


DAPO = RL | {
    "trainer": {"steps": 9, "prompts_per_step": 2},
    "algorithm": {"dynamic_sampling": True, "overlong_buffer": 4, "overlong_penalty": 1.0},
}
SHORT, LONG = 2, 7  # tokens; the penalty begins after 4 of 8


def dynamic_stage(groups: list[list[tuple[str, int]]], folder) -> Stage:
    scorer = Scorer([RewardConfig(function="gsm8k")])
    return stage_of([], folder, DAPO, sampler=_Sampler(groups), scorer=scorer)[0]


def test_dynamic_sampling_asks_whether_the_answers_differ_not_their_lengths(tmp_path):
    """Would catch: a group that is right throughout, kept because one of its responses is penalised for its length, or
    kept groups that miss the penalty."""
    all_right, mixed = [("#### 7", SHORT), ("#### 7", LONG)], [("#### 7", LONG), ("#### 5", SHORT)]
    stage = dynamic_stage([all_right, mixed, mixed, all_right], tmp_path)
    groups = scored_groups(stage, 0)
    assert [group.rewards for group in groups] == [(0.25, 0.0)] * 2


def test_rewards_of_a_step_are_those_of_all_its_rounds(tmp_path):
    """Would catch: reward/mean of the last round alone, which is what its few prompts happened to be."""
    right, wrong = ("#### 7", SHORT), ("#### 5", SHORT)
    stage = dynamic_stage(
        [[right, right], [right, right], [right, wrong], [wrong, right]] + [[wrong, right]] * 2, tmp_path
    )
    groups = scored_groups(stage, 0)
    stage.track(0, updates=[GOOD], batch=None, rollouts=flatten(groups))
    got = {
        name: stage._metrics[f"reward/{name}"] for name in ("mean", "gsm8k/mean", "std", "min", "error_frac")
    }
    want = {"mean": 6 / 8, "gsm8k/mean": 6 / 8, "std": math.sqrt(3) / 4, "min": 0.0, "error_frac": 0.0}
    assert got == pytest.approx(want)
    groups = scored_groups(stage, 1)
    stage.track(1, updates=[GOOD], batch=None, rollouts=flatten(groups))
    assert stage._metrics["reward/mean"] == 0.5
