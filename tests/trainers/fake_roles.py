"""A stage whose models are stand-ins: they answer from what a test says, and keep what they were asked."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rlhf.console import Console
from rlhf.data.rows import Dataset
from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import Recipe
from rlhf.records import Batch, Prompt, Rollout, RolloutGroup
from rlhf.rollout import SamplingParams
from rlhf.tracking import Tracker
from rlhf.trainers.deepspeed_engine import UpdateStats
from rlhf.trainers.roles import Clock
from rlhf.trainers.stage import Stage

PARAMS = SamplingParams(temperature=1.0, max_tokens=8, stop_ids=(0,))
GOOD = UpdateStats(loss=1.0, grad_norm=1.0, lr=0.1, skipped=False, sums={})


def prompts(count: int, *, length: int = 2) -> Dataset[Prompt]:
    items = tuple(Prompt(f"train/{i}", (1,) * length, f"p{i}", {"number": i}) for i in range(count))
    return Dataset(items, "print", {"kept": count, "bad_rows": 0})


def rollout(
    name: str,
    response_ids: Sequence[int],
    *,
    reward: float | None = None,
    end: str = "stop",
    prompt: Any = None,
) -> Rollout:
    n = len(response_ids)
    who = prompt or Prompt("train/0", (1, 1), "p")
    return Rollout(
        name, who, tuple(response_ids), (True,) * n, (-1.0,) * n, (0,) * n, end, "x", reward=reward
    )


def group(number: int, *rewards: float | None, ids: Sequence[Sequence[int]] | None = None) -> RolloutGroup:
    who = Prompt(f"train/{number}", (1, 10 + number), f"p{number}")
    made = (
        rollout(f"0/{number}/{j}", ids[j] if ids else (5 + j, 0), reward=reward, prompt=who)
        for j, reward in enumerate(rewards)
    )
    return RolloutGroup(who, tuple(made))


class FakeGroup:
    """Answers nothing, keeps every call, and writes a file where it is asked to save."""

    size = 1

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        self.calls.append((method, *args))
        if method == "save":
            (Path(args[0]) / "state").write_text("saved")
        return [None]


class FakeActor:
    """`outcomes` are the results of its updates, in order (all good where there are none)."""

    def __init__(
        self,
        outcomes: Sequence[UpdateStats] = (),
        *,
        score: Callable[[Batch], torch.Tensor] = lambda batch: torch.zeros(batch.token_ids.shape),
        rewards: Callable[[Batch], torch.Tensor] | None = None,
    ) -> None:
        self.group, self.score, self.rewards = FakeGroup(), score, rewards
        self.updates: list[tuple[Batch, str]] = []
        self._outcomes = iter(outcomes)

    def update(self, *parts: tuple[Batch, str], **changing: float) -> UpdateStats:
        self.updates.append(parts[0])
        return next(self._outcomes, GOOD)


class FakeCritic(FakeActor):
    def update(self, batch: Batch) -> UpdateStats:
        return super().update((batch, "value"))


class FakeSampler:
    """`respond(prompt, sample, params) -> (response ids, finish reason)`."""

    def __init__(
        self, respond: Callable[..., tuple[Sequence[int], str]] = lambda *_: ((5, 0), "stop")
    ) -> None:
        self.group, self._respond = FakeGroup(), respond
        self.asked: list[Mapping[str, Any]] = []

    def generate(
        self,
        rows: Sequence[Prompt],
        params: SamplingParams,
        *,
        samples: int,
        purpose: str,
        step: int,
        first: int = 0,
    ) -> list[RolloutGroup]:
        self.asked.append({"params": params, "samples": samples, "purpose": purpose, "prompts": list(rows)})
        groups = []
        for i, prompt in enumerate(rows, first):
            answers = [self._respond(prompt, j, params) for j in range(samples)]
            made = (
                rollout(f"{step}/{i}/{j}", ids, end=end, prompt=prompt)
                for j, (ids, end) in enumerate(answers)
            )
            groups.append(RolloutGroup(prompt, tuple(made)))
        return groups

    def take_stats(self) -> dict[str, float]:
        return {}


class FakeScorer:
    """`reward(rollout) -> float | None`."""

    answer_of = None

    def __init__(self, reward: Callable[[Rollout], float | None]) -> None:
        self._reward, self.stats = reward, {}

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [r.replace(reward=self._reward(r)) for r in rollouts]


def fake_stage(recipe: dict[str, Any], folder: Path, monkeypatch: Any, **given: Any) -> Stage:
    """A stage of `recipe` (its model and data need not exist) with the roles and data that are `given`."""
    base = {"model": {"path": "none"}, "data": {"path": "none"}, "tracking": {"wandb": "off"}}
    monkeypatch.setattr("rlhf.trainers.stage.publish", lambda *_, **__: SimpleNamespace(bytes=0))
    return stage_around(plan_from_dict({**base, **recipe}).stages[0].recipe, folder, **given)


def stage_around(recipe: Recipe, folder: Path, **given: Any) -> Stage:
    """A stage of a recipe as it is, with stand-ins for what is not `given`."""
    console = Console(file=io.StringIO(), interactive=False)
    tracker = Tracker(
        folder, recipe.tracking, run_name="test", resolved_recipe={}, resume_step=None, console=console
    )
    tracker.begin_stage("stage", method=recipe.method, first_step=1, last_step=recipe.trainer.steps)
    roles = {"actor": FakeActor(), "data": prompts(8), "eval_sets": {}, "eval_pairs": {}} | given
    return Stage(
        name="stage",
        recipe=recipe,
        folder=folder,
        offset=0,
        total_steps=recipe.trainer.steps,
        tracker=tracker,
        clock=Clock(),
        sampling=PARAMS,
        eval_sampling=PARAMS,
        **roles,
    )
