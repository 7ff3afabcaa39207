"""One stage of a run: everything around a method's loop.

A loop (`grpo.py`, `sft.py`) says what a step does; the stage says what happens between steps: resume, evaluation,
publishing, metrics, checkpoints, stopping. Order at the end of a step: evaluate, write the step's record, save. A
record is therefore on disk before the checkpoint that covers it, and on resume the records are cut back to the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rlhf.advantages import advantage_metrics
from rlhf.batching import SftExample
from rlhf.checkpoint import Checkpoint, save_checkpoint
from rlhf.data import PromptDataset, SftDataset, step_rows
from rlhf.faults import at_step
from rlhf.recipe.schema import Recipe
from rlhf.records import Batch, Prompt, Rollout
from rlhf.reward import Scorer
from rlhf.rollout import SamplingParams
from rlhf.tracking import Tracker
from rlhf.trainers.deepspeed_engine import UpdateStats
from rlhf.trainers.evaluate import evaluate
from rlhf.trainers.metrics import rollout_metrics, update_metrics
from rlhf.trainers.roles import Actor, Clock, Reference, Sampler
from rlhf.trainers.weights import publish


class Preempted(Exception):
    """The run was asked to stop; its state is saved."""


class TrainingStopped(RuntimeError):
    """The run stopped itself: going on would have wasted or damaged it."""


@dataclass
class Progress:
    """What a checkpoint holds beside the actor's state. Steps count within the stage."""

    step: int = 0  # steps completed
    version: int = 0  # optimiser steps applied since the stage's start
    skipped: int = 0  # updates skipped for a non-finite loss or gradient
    skipped_in_a_row: int = 0


@dataclass
class Stage:
    """What a method's loop works with."""

    name: str
    recipe: Recipe
    folder: Path  # checkpoints go to folder/checkpoints
    offset: int  # steps of the run before this stage
    total_steps: int
    data: PromptDataset | SftDataset
    eval_sets: Mapping[str, PromptDataset]
    actor: Actor
    tracker: Tracker
    clock: Clock
    sampling: SamplingParams
    eval_sampling: SamplingParams
    scorer: Scorer | None = None
    sampler: Sampler | None = None
    reference: Reference | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)  # of recipe and data, kept in checkpoints
    should_stop: Callable[[], bool] = lambda: False
    progress: Progress = field(default_factory=Progress)

    _metrics: dict[str, float] = field(default_factory=dict, init=False)
    _timings: dict[str, float] = field(default_factory=dict, init=False)
    _published: int = field(default=-1, init=False)  # version of the weights that the sampler holds

    # -- the loop's side -------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Indices of the remaining steps, from 0. Everything between two steps happens in here."""
        self.publish()  # a resumed actor is not what the engines have loaded
        if self.progress.step == 0 and self.offset == 0:  # later stages begin where the one before was evaluated
            self._evaluate()
            self._write_record()
        for step in range(self.progress.step, self.total_steps):
            if self.should_stop():
                raise Preempted(f"stopped before step {self.offset + step + 1} of stage {self.name!r}")
            at_step(self.offset + step + 1)
            self.actor.group.call("set_step", self.offset + step + 1)
            yield step
            self.progress.step = step + 1
            last = step + 1 == self.total_steps
            every = self.recipe.evaluation.every
            if last or (every and (step + 1) % every == 0):
                self._evaluate()
            self._write_record()
            stop = self.should_stop()
            if last or stop or (step + 1) % self.recipe.run.save_every == 0:
                self._save()
            if stop:
                raise Preempted(f"stopped after step {self.offset + step + 1} of stage {self.name!r}; state saved")

    def prompts(self, step: int) -> list[Prompt]:
        """The step's prompts: a function of (data, seed, step)."""
        return [self.data[i] for i in self._rows(step)]

    def examples(self, step: int) -> list[SftExample]:
        """The step's examples: a function of (data, seed, step)."""
        return [self.data[i] for i in self._rows(step)]

    def _rows(self, step: int) -> list[int]:
        rows_per_step = self.recipe.trainer.prompts_per_step
        return step_rows(len(self.data), seed=self.recipe.run.seed, step=step, rows_per_step=rows_per_step)

    def old_logprobs(self, batch: Batch) -> torch.Tensor | None:
        """(B, T) fp32: log-probs under the weights before this step's updates; None = those of the update's own forward.

        With one update a step that forward gives them for nothing, and they are still compared with what the sampler
        reported (mismatch/*).
        """
        trainer = self.recipe.trainer
        if trainer.minibatches_per_step * trainer.passes_per_step == 1:
            return None
        return self.actor.score(batch)

    def publish(self) -> None:
        """Bring the rollout engines to the actor's weights."""
        if self.sampler is None or self._published == self.progress.version:
            return
        with self.clock.phase("publish"):
            publish(self.actor.group, self.sampler.group, version=self.progress.version, runtime=self.recipe.runtime)
        self._published = self.progress.version

    def update(self, batch: Batch, loss: str) -> UpdateStats:
        """One optimiser step of the actor; counts skipped ones and stops the run after too many in a row."""
        stats = self.actor.update(batch, loss)
        p, limit = self.progress, self.recipe.trainer.max_skipped_steps
        if stats.skipped:
            p.skipped, p.skipped_in_a_row = p.skipped + 1, p.skipped_in_a_row + 1
        else:
            p.version, p.skipped_in_a_row = p.version + 1, 0
        if p.skipped_in_a_row >= limit:
            raise TrainingStopped(
                f"{p.skipped_in_a_row} updates in a row had a non-finite loss or gradient (trainer.max_skipped_steps="
                f"{limit}); the last good state is in {self.checkpoints}. Lower trainer.lr or look at the samples of this step"
            )
        return stats

    def track(
        self, step: int, *, batch: Batch, updates: Sequence[UpdateStats], rollouts: Sequence[Rollout] | None = None
    ) -> None:
        """Note the step's numbers; they are written after a possible evaluation."""
        self._metrics |= update_metrics(updates) | {
            "robust/skipped_steps": float(self.progress.skipped),
            "robust/bad_rows": float(self.data.counts["bad_rows"]),
        }
        self._timings["train_tokens"] = float(batch.attention_mask.sum())
        if rollouts is not None:
            before = self.progress.version - sum(not u.skipped for u in updates)
            self._metrics |= rollout_metrics(rollouts, version=before) | self.scorer.stats
            self._metrics |= advantage_metrics(batch) | {
                "rollout/masked_frac": 1.0 - batch.num_loss_sequences / len(batch),
                "weights/version": float(self.progress.version),
            }
            self._timings["rollout_tokens"] = float(sum(len(r.response_ids) for r in rollouts))
            self.tracker.samples(self.offset + step + 1, self.name, rollouts)

    # -- between steps ---------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: the actor's state and the position."""
        self.actor.group.call("load", str(checkpoint.path))
        self.progress = Progress(**checkpoint.meta["progress"])

    def _evaluate(self) -> None:
        if not self.eval_sets:
            return
        self.publish()
        for name, prompts in self.eval_sets.items():
            metrics, _ = evaluate(
                name, prompts, self.sampler, self.scorer, self.recipe.evaluation, params=self.eval_sampling
            )
            self._metrics |= metrics

    def _write_record(self) -> None:
        timings = self.clock.take()
        for kind, phase in (("train", "update"), ("rollout", "rollout")):
            tokens, seconds = self._timings.pop(f"{kind}_tokens", None), timings.get(f"time/{phase}_s")
            if tokens and seconds:
                timings[f"perf/{kind}_tokens_per_s"] = tokens / seconds
        if self._metrics:
            self.tracker.log(self.offset + self.progress.step, self.name, self._metrics, timings)
        self._metrics = {}

    def _save(self) -> None:
        with self.clock.phase("checkpoint"):
            self.tracker.sync()
            save_checkpoint(
                self.checkpoints,
                step=self.progress.step,
                write=lambda folder: self.actor.group.call("save", str(folder)),
                meta={"stage": self.name, "progress": asdict(self.progress), "fingerprint": dict(self.fingerprint)},
                keep_last=self.recipe.run.keep_last,
            )
