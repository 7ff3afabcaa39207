"""One stage of a run: everything around a method's loop.

A loop (`grpo.py`, `dpo.py`, ...) says what a step does; the stage says what happens between steps: resume, evaluation,
publishing, metrics, checkpoints, stopping. Order at the end of a step: evaluate, write the step's record, save. A
record is therefore on disk before the checkpoint that covers it, and on resume the records are cut back to the
checkpoint. What several loops do alike within a step is here too; sampling rounds are in `rounds.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlhf import rng
from rlhf.advantages import advantage_metrics
from rlhf.batching import make_sft_batch, split_minibatches, why_masked
from rlhf.checkpoint import Checkpoint, CheckpointError, load_tensors, save_checkpoint, save_tensors
from rlhf.data import Curriculum, rows_from
from rlhf.faults import at_step, faults_are_set
from rlhf.kl import adaptive_kl_coef
from rlhf.objectives import select_by_covariance
from rlhf.recipe import rules
from rlhf.recipe.schema import AlgorithmConfig, Recipe
from rlhf.records import Batch, Prompt, Rollout, RolloutGroup
from rlhf.reward import Scorer
from rlhf.rollout import SamplingParams
from rlhf.settings import bind
from rlhf.tracking import Tracker
from rlhf.trainers.deepspeed_engine import UpdateStats
from rlhf.trainers.evaluate import LOWER_IS_BETTER, evaluate, evaluate_pairs
from rlhf.trainers.forward import POLICY_LOSSES
from rlhf.trainers.held_out import evaluate_rows
from rlhf.trainers.metrics import rollout_metrics, staleness_metrics, update_metrics
from rlhf.trainers.reference_cache import ReferenceCache, shared_file
from rlhf.trainers.replay import Replay
from rlhf.trainers.reward_scale import store_scale
from rlhf.trainers.rewarding import RewardSum, merged_metrics, penalty_metrics, shorten
from rlhf.trainers.roles import Actor, Clock, Critic, Reference, Sampler, Teacher
from rlhf.trainers.weights import publish

_CURRICULUM_FILE = "curriculum.safetensors"  # in a checkpoint


class Preempted(Exception):
    """The run was asked to stop; its state is saved."""


class TrainingStopped(RuntimeError):
    """The run stopped itself: going on would have wasted or damaged it."""


@dataclass
class Progress:
    """What a checkpoint holds beside the models' state. Steps count within the stage."""

    step: int = 0  # steps completed
    position: int = 0  # rows of the data taken
    updates: int = 0  # optimiser steps of the actor tried since the stage's start
    version: int = 0  # those of them that were applied
    skipped: int = 0  # updates skipped, the actor's and the critic's, for whatever reason
    skipped_in_a_row: int = 0  # by the actor, for a non-finite loss or gradient
    critic_skipped_in_a_row: int = 0
    kl_coef: float = 0.0  # as it is now: it may adapt
    best: float | None = None  # best value of evaluation.keep_best so far
    reference_version: int = 0  # `version` of the actor that the reference last moved to


@dataclass
class Stage:
    """What a method's loop works with."""

    name: str
    recipe: Recipe
    folder: Path  # checkpoints go to folder/checkpoints
    offset: int  # steps of the run before this stage
    total_steps: int
    data: Any  # a dataset of rlhf.data
    eval_sets: Mapping[str, Any]
    eval_pairs: Mapping[str, Any]
    actor: Actor
    tracker: Tracker
    clock: Clock
    sampling: SamplingParams
    eval_sampling: SamplingParams
    critic: Critic | None = None
    reference: Reference | None = None
    teacher: Teacher | None = None
    sampler: Sampler | None = None
    opponent: Sampler | None = None  # whose responses training learns from, where that is not the sampler
    scorer: Scorer | RewardSum | None = None
    eval_scorer: Scorer | None = None  # of evaluations; None = the training's
    ptx_data: Any = None
    prompt_data: Any = None  # prompts of a method whose data is something else
    gold: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # the data's answers by prompt id
    held_out: Mapping[str, Any] = field(default_factory=dict)  # rows of the data's kind
    context: int | None = None  # tokens that the model can read
    identity: Mapping[str, Mapping[str, str]] = field(
        default_factory=dict
    )  # what it was started with; in checkpoints
    export: Callable[[Path], None] = lambda folder: None  # writes the model as it is now
    evaluated: Collection[str] = ()  # eval_sets of which an earlier stage's end has this start's values
    should_stop: Callable[[], bool] = lambda: False
    progress: Progress = field(default_factory=Progress)

    _metrics: dict[str, float] = field(default_factory=dict, init=False)
    _timings: dict[str, float] = field(default_factory=dict, init=False)
    # rollouts of the step and the metrics of their rewards, one entry for each call of the scorer
    _judged: list[tuple[list[Rollout], dict[str, float]]] = field(default_factory=list, init=False)
    _published: int = field(default=-1, init=False)  # version of the weights that the sampler holds
    _cache: ReferenceCache | None = field(default=None, init=False)
    _curriculum: Curriculum | None = field(default=None, init=False)
    _replay: Replay | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.progress.kl_coef = self.recipe.algorithm.kl_coef
        if self.recipe.curriculum is not None:
            ids = [self.data[i].id for i in range(len(self.data))]
            self._curriculum = Curriculum(self.recipe.curriculum, ids, seed=self.recipe.run.seed)
        if self.recipe.algorithm.replay is not None:
            self._replay = Replay(self.recipe.algorithm.replay, seed=self.recipe.run.seed)

    # -- the loop's side: data -------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Indices of the remaining steps, from 0. Everything between two steps happens in here."""
        self.publish()  # a resumed actor is not what the engines have loaded
        if self.progress.step == 0:
            self._evaluate({n: rows for n, rows in self.eval_sets.items() if n not in self.evaluated})
            self._write_record()
        for step in range(self.progress.step, self.total_steps):
            if self.should_stop():
                raise Preempted(f"stopped before step {self.offset + step + 1} of stage {self.name!r}")
            self._announce(self.offset + step + 1)
            yield step
            self.progress.step = step + 1
            last = step + 1 == self.total_steps
            every = self.recipe.evaluation.every
            if last or (every and (step + 1) % every == 0):
                self._evaluate(self.eval_sets)
            self._write_record()
            stop = self.should_stop()
            if last or stop or (step + 1) % self.recipe.run.save_every == 0:
                self._save()
            if stop:
                raise Preempted(
                    f"stopped after step {self.offset + step + 1} of stage {self.name!r}; state saved"
                )

    def _announce(self, step: int) -> None:
        """Tell the fault points of every process which step this is, if any is to fail."""
        if not faults_are_set():
            return
        at_step(step)
        roles = [self.actor, self.critic, self.reference, self.teacher, self.sampler]
        for group in {id(role.group): role.group for role in roles if role is not None}.values():
            group.call("set_step", step)

    def next_rows(self, data: Any = None) -> list[Any]:
        """The next rows of the training data (or of `data`), as many as a step has: a function of (data, seed, rows
        taken so far), and with a curriculum of the pass rates so far."""
        data, count = self.data if data is None else data, self.recipe.trainer.prompts_per_step
        position = self.progress.position
        if self._curriculum is not None:
            rows, self.progress.position = self._curriculum.next_rows(position, count)
        else:
            rows = rows_from(len(data), seed=self.recipe.run.seed, position=position, count=count)
            self.progress.position += count
        return [data[i] for i in rows]

    def ptx_rows(self, update: int) -> list[Any]:
        """Rows of the texts to keep modelling, for the actor's update of this number."""
        count = self.recipe.ptx.rows_per_step
        seed = rng.key(self.recipe.run.seed, "ptx") % 2**32
        rows = rows_from(len(self.ptx_data), seed=seed, position=update * count, count=count)
        return [self.ptx_data[i] for i in rows]

    # -- the loop's side: sampling and rewards ---------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], step: int, *, first: int = 0) -> list[RolloutGroup]:
        """rollout.group_size responses to each prompt; `first` numbers the prompts of a later round of the step."""
        size, sampler = self.recipe.rollout.group_size, self.opponent or self.sampler
        return sampler.generate(
            prompts, self.sampling, samples=size, purpose="rollout", step=step, first=first
        )

    def reward(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with their rewards, the penalty on overlong ones included."""
        return self.penalized(self.judged(rollouts))

    def judged(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with what they earn for what they say: no penalty on their length. A curriculum remembers it."""
        if self.scorer is None:
            return list(rollouts)
        scored = self.scorer.score(rollouts)
        self._judged.append((scored, dict(self.scorer.stats)))
        if self._curriculum is not None:
            self._curriculum.remember(scored)
        return scored

    def penalized(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Judged rollouts with the penalty on overlong ones."""
        return list(rollouts) if self.scorer is None else shorten(rollouts, self.recipe)

    def greedy_rewards(self, groups: Sequence[RolloutGroup], step: int) -> torch.Tensor:
        """(B,) fp32: for every rollout, the reward of the greedy answer to its prompt (ReMax's baseline)."""
        greedy = replace(self.sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
        answers = self.sampler.generate(
            [group.prompt for group in groups], greedy, samples=1, purpose="greedy", step=step
        )
        scored = self.penalized(self.scorer.score([answer.rollouts[0] for answer in answers]))
        rewards = [float("nan") if r.reward is None else r.reward for r in scored]
        return torch.tensor([reward for reward, group in zip(rewards, groups) for _ in group.rollouts])

    # -- the loop's side: scores -----------------------------------------------------------------------------------

    @property
    def policy_settings(self) -> AlgorithmConfig:
        """The algorithm section with the method's defaults, and the KL's weight as it is now."""
        return rules.decided(self.recipe).model_copy(update={"kl_coef": self.progress.kl_coef})

    def scored(self, batch: Batch) -> Batch:
        """The batch with the log-probs, and for ppo the values, that the step needs before its first update.

        `old_logprobs` stay None where they are those of the update's own forward: with one update a step that gives
        them for nothing, and they are still compared with what the sampler reported (mismatch/*).
        """
        trainer, algorithm = self.recipe.trainer, self.policy_settings
        one_update = trainer.minibatches_per_step * trainer.passes_per_step == 1
        needs_old = (
            not one_update or algorithm.covariance != "none" or (algorithm.kl_in_reward and algorithm.kl_coef)
        )
        if self.recipe.shares_trunk:
            old_logprobs, values = self.actor.score_with_values(batch)
            batch = batch.replace(old_logprobs=old_logprobs, values=values)
        elif needs_old:
            batch = batch.replace(old_logprobs=self.actor.score(batch))
        if self.critic is not None:
            batch = batch.replace(values=self.critic.score(batch))
        if self.reference is not None:
            batch = batch.replace(ref_logprobs=self.reference.score(batch))
        return batch

    def with_covariance(self, batch: Batch, step: int) -> Batch:
        """The batch with the tokens marked that `algorithm.covariance` holds back."""
        settings = self.policy_settings
        if settings.covariance == "none":
            return batch
        key = rng.key(self.recipe.run.seed, "covariance", step)
        select = bind(select_by_covariance, settings, key=key)
        return batch.replace(cov_tokens=select(batch.old_logprobs, batch.advantages, batch.loss_mask))

    def prepare_reference(self, make_batch: Callable[[Sequence[Any]], Batch]) -> None:
        """Compute the reference's log-probs of the whole data before the first update, or take them from the disk. A
        reference of its own is let go then, and not even loaded where they are on the disk."""
        if not rules.needs_reference_logprobs(self.recipe) or self.recipe.reference.update_every is not None:
            return
        sets = {"train": self.data, **self.eval_pairs}
        made_from = {**self.identity, "forward": {"dtype": self.recipe.model.dtype}}
        places = [self.folder / "reference.safetensors"]
        if (shared := self.recipe.reference.cache_dir) is not None:
            places.append(shared_file(Path(shared).expanduser(), sets, made_from))
        found = {path: ReferenceCache.load(path, sets, made_from) for path in places}
        self._cache = next((cache for cache in found.values() if cache is not None), None)
        if self._cache is None and self.reference is None and self.progress.updates:
            raise CheckpointError(
                f"{places[0]} is missing or damaged, and the actor whose log-probs it held has moved since: restore the "
                "file, or start again under another run.name"
            )
        if self._cache is None:
            scorer = self.reference or self.actor
            self._cache = ReferenceCache.make(sets, make_batch, scorer.score, made_from)
        for path in (path for path, cache in found.items() if cache is None):
            self._cache.save(path)
        if self.reference is not None:
            self.reference.group.call("release_reference")
            self.reference = None

    def with_reference(self, batch: Batch) -> Batch:
        """The batch with the reference's log-probs, unless nothing compares with a reference."""
        if self._cache is not None:
            return batch.replace(ref_logprobs=self._cache.look_up(batch))
        if self.reference is not None:
            return batch.replace(ref_logprobs=self.reference.score(batch))
        return batch

    # -- the loop's side: updates ----------------------------------------------------------------------------------

    def minibatches(self, batch: Batch, *, by_groups: bool) -> Iterator[Batch]:
        """The step's optimiser steps: every pass over the batch, cut into trainer.minibatches_per_step, or into as many
        as there are units where a selection left fewer."""
        trainer = self.recipe.trainer
        by_groups = by_groups and batch.group_ids is not None
        units = len(batch.group_ids.unique()) if by_groups else len(batch)
        for _ in range(trainer.passes_per_step):
            yield from split_minibatches(batch, min(trainer.minibatches_per_step, units), by_groups=by_groups)

    def moved_enough(self, updates: Sequence[UpdateStats]) -> bool:
        """Whether the policy is further from the old one than algorithm.early_stop_kl allows."""
        limit = self.recipe.algorithm.early_stop_kl
        if limit is None or not updates or updates[-1].empty:
            return False
        return update_metrics(updates[-1:]).get("policy/approx_kl", 0.0) > limit

    def update(self, batch: Batch, loss: str) -> UpdateStats:
        """One optimiser step of the actor; counts skipped ones and stops the run after too many bad ones in a row.

        An empty step (no token in its loss) is skipped and counted too, but is no sign of a broken model: it neither
        lengthens nor ends a row of steps whose loss or gradient was not finite.
        """
        parts, changing = [(batch, loss)], {}
        if loss in POLICY_LOSSES:
            changing["kl_coef"] = self.progress.kl_coef
            if self.ptx_data is not None:
                parts.append((make_sft_batch(self.ptx_rows(self.progress.updates)), "ptx"))
        stats = self.actor.update(*parts, **changing)
        self.progress.updates += 1
        self.progress.version += not stats.skipped
        self.progress.skipped_in_a_row = self._note(stats, "actor", self.progress.skipped_in_a_row)
        return stats

    def update_critic(self, batch: Batch) -> UpdateStats:
        """One optimiser step of the critic, counted like the actor's."""
        stats, before = self.critic.update(batch), self.progress.critic_skipped_in_a_row
        self.progress.critic_skipped_in_a_row = self._note(stats, "critic", before)
        return stats

    def _note(self, stats: UpdateStats, role: str, in_a_row: int) -> int:
        """Say what is wrong with an update. Returns the role's bad ones in a row, of which `in_a_row` came before."""
        if stats.unchanged:
            shown = ", ".join(stats.unchanged[:5]) + (", ..." if len(stats.unchanged) > 5 else "")
            self.tracker.warn(
                f"{len(stats.unchanged)} trained tensors of the {role} did not move in its first updates: {shown}"
            )
        if not stats.skipped:
            return 0
        self.progress.skipped += 1
        self._say_skipped(stats)
        in_a_row += not stats.empty
        limit = self.recipe.trainer.max_skipped_steps
        if in_a_row >= limit:
            raise TrainingStopped(
                f"{in_a_row} updates of the {role} in a row had a non-finite loss or gradient (trainer.max_skipped_steps="
                f"{limit}); the last good state is in {self.checkpoints}. Lower trainer.lr or look at the samples of this step"
            )
        return in_a_row

    def _say_skipped(self, stats: UpdateStats) -> None:
        why = "no token counts in its loss" if stats.empty else "its loss or gradient was not finite"
        step = self.offset + self.progress.step + 1
        self.tracker.recurring(step, f"update skipped, no weight has moved: {why}")

    # -- the loop's side: weights ----------------------------------------------------------------------------------

    def publish(self) -> None:
        """Bring the rollout engines to the actor's weights."""
        if self.sampler is None or self._published == self.progress.version:
            return
        with self.clock.phase("publish"):
            report = publish(
                self.actor.group,
                self.sampler.group,
                version=self.progress.version,
                runtime=self.recipe.runtime,
            )
        self._published = self.progress.version
        self._timings["perf/published_bytes"] = float(report.bytes)

    @contextmanager
    def exported_weights(self) -> Iterator[None]:
        """Within it the actor has the weights that an export writes: with trainer.ema_decay their moving average. The
        rollout engines follow with `publish`, and are back at the actor's own afterwards."""
        if self.recipe.trainer.ema_decay is None:
            yield
            return
        held, self._published = self._published, -1
        self.actor.group.call("show_average", True)
        try:
            yield
        finally:
            self.actor.group.call("show_average", False)
        if self._published < 0:  # nothing was sampled
            self._published = held
        else:
            self._published = -1
            self.publish()

    def refresh_reference(self, step: int) -> None:
        """Move the reference towards the actor where `reference.update_every` says so."""
        config = self.recipe.reference
        if config.update_every is None or (step + 1) % config.update_every:
            return
        source, target = self.actor.group, self.reference.group
        with self.clock.phase("reference_update"):
            if source is not target:
                target.call("before_mix")
                publish(
                    source,
                    target,
                    version=self.progress.version,
                    runtime=self.recipe.runtime,
                    role="reference",
                )
            target.call("mix_reference", config.update_mix, beside_actor=source is target)
            target.call("set_reference_version", self.progress.version)
        self.progress.reference_version = self.progress.version

    # -- the loop's side: numbers ----------------------------------------------------------------------------------

    def track(
        self,
        step: int,
        *,
        updates: Sequence[UpdateStats],
        batch: Batch | None,
        rollouts: Sequence[Rollout] | None = None,
        critic_updates: Sequence[UpdateStats] = (),
        replayed: Sequence[Rollout] = (),
    ) -> None:
        """Note the step's numbers; they are written after a possible evaluation."""
        self._metrics |= update_metrics(updates) | update_metrics(critic_updates, role="value")
        self._metrics |= {
            "robust/skipped_steps": float(self.progress.skipped),
            "robust/bad_rows": float(self.data.counts["bad_rows"]),
        }
        if self._curriculum is not None:
            self._metrics |= self._curriculum.take_metrics()
        if batch is not None:
            self._timings["train_tokens"] = float(batch.attention_mask.sum())
        if rollouts is not None:
            self._track_rollouts(step, rollouts, batch)
            before = self.progress.version - sum(not u.skipped for u in updates)
            self._metrics |= staleness_metrics([*rollouts, *replayed], version=before)
        self._adapt_kl(len(rollouts or ()))

    def _track_rollouts(self, step: int, rollouts: Sequence[Rollout], batch: Batch | None) -> None:
        scored = any(r.reward is not None or r.reward_error is not None for r in rollouts)
        self._metrics |= rollout_metrics(rollouts) | (merged_metrics(self._judged) if scored else {})
        self._metrics |= penalty_metrics(rollouts)
        self._judged = []
        self._metrics["weights/version"] = float(self.progress.version)
        if batch is not None and batch.advantages is not None:
            self._metrics |= advantage_metrics(
                batch, self.policy_settings, rewarded=self.recipe.method != "distill"
            )
        if batch is not None:
            self._metrics["rollout/masked_frac"] = 1.0 - batch.num_loss_sequences / len(batch)
        self._timings["rollout_tokens"] = float(sum(len(r.response_ids) for r in rollouts))
        masked = [why_masked(r, mask_truncated=self.recipe.algorithm.mask_truncated) for r in rollouts]
        masked = masked if scored else [None] * len(rollouts)
        self.tracker.samples(self.offset + step + 1, self.name, rollouts, masked=masked)

    def replayed(self, fresh: Sequence[RolloutGroup], step: int) -> list[RolloutGroup]:
        """Groups of earlier steps to learn from beside the `fresh` ones, as `algorithm.replay` says."""
        if self._replay is None:
            return []
        drawn = self._replay.exchange(fresh, step)
        self.note({"replay/groups": float(len(drawn)), "replay/buffer_groups": float(len(self._replay))})
        return drawn

    def note(self, metrics: Mapping[str, float]) -> None:
        """Add numbers to the step's record."""
        self._metrics |= metrics

    def _adapt_kl(self, num_samples: int) -> None:
        algorithm = self.recipe.algorithm
        if algorithm.kl_target is None or "policy/kl_ref" not in self._metrics:
            return
        kl = self._metrics["policy/kl_ref"] * self._metrics["rollout/response_tokens_mean"]
        self._metrics["policy/kl_coef"] = self.progress.kl_coef
        if math.isfinite(kl):  # else an update was skipped, which is counted where it is
            adapt = bind(adaptive_kl_coef, algorithm, num_samples=num_samples)
            self.progress.kl_coef = adapt(self.progress.kl_coef, kl)

    # -- between steps ---------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: the models' state and the position."""
        for group in self._trained_groups():
            group.call("load", str(checkpoint.path))
        self.progress = Progress(**checkpoint.meta["progress"])
        if self.opponent is not None:
            self.reference.group.call("set_reference_version", self.progress.reference_version)
        if self._curriculum is not None:
            self._curriculum.load_state(load_tensors(checkpoint.path / _CURRICULUM_FILE))
        if self._replay is not None:
            self._replay.load(checkpoint.path)

    def _trained_groups(self) -> list[Any]:
        """The groups that hold state which changes, each once."""
        roles = [self.actor, self.critic]
        if self.recipe.reference.update_every is not None:
            roles.append(self.reference)
        return list({id(role.group): role.group for role in roles if role is not None}.values())

    def _evaluate(self, eval_sets: Mapping[str, Any]) -> None:
        if not (eval_sets or self.eval_pairs or self.held_out):
            return
        with self.exported_weights():
            if eval_sets:
                self.publish()
            for name, prompts in eval_sets.items():
                metrics, _ = evaluate(
                    name,
                    prompts,
                    self.sampler,
                    self.eval_scorer or self.scorer,
                    self.recipe.evaluation,
                    params=self.eval_sampling,
                )
                self._metrics |= metrics
            for name, pairs in self.eval_pairs.items():
                self._metrics |= evaluate_pairs(name, pairs, self)
            for name, rows in self.held_out.items():
                self._metrics |= evaluate_rows(name, rows, self)
            self._keep_best()

    def _keep_best(self) -> None:
        """Write the model beside the checkpoints if it is the best so far by evaluation.keep_best; NaN is no value."""
        metric = self.recipe.evaluation.keep_best
        siblings = [m for m in self._metrics if metric and m.startswith(f"{metric.rpartition('/')[0]}/")]
        if metric is None or not siblings:  # its set was not evaluated now
            return
        if metric not in siblings:
            raise ValueError(
                f"evaluation.keep_best={metric!r} is no metric of its set; there are {', '.join(siblings)}"
            )
        value, best = self._metrics[metric], self.progress.best
        lower = metric.rpartition("/")[2] in LOWER_IS_BETTER
        if math.isnan(value) or (best is not None and (value >= best if lower else value <= best)):
            return
        self.progress.best = value
        if self.recipe.method == "rm":
            store_scale(self)
        self.export(self.folder / "model-best")

    def _write_record(self) -> None:
        timings = self.clock.take()
        for kind, phase in (("train", "update"), ("rollout", "rollout")):
            tokens, seconds = self._timings.pop(f"{kind}_tokens", None), timings.get(f"time/{phase}_s")
            if tokens and seconds:
                timings[f"perf/{kind}_tokens_per_s"] = tokens / seconds
        for sampler in (self.sampler, self.opponent):
            timings |= sampler.take_stats() if sampler is not None else {}
        if self._metrics:
            self.tracker.log(
                self.offset + self.progress.step, self.name, self._metrics, timings | self._timings
            )
        self._metrics, self._timings = {}, {}

    def _save(self) -> None:
        with self.clock.phase("checkpoint"):
            self.tracker.sync()
            save_checkpoint(
                self.checkpoints,
                step=self.progress.step,
                write=self._write_state,
                meta={"stage": self.name, "progress": asdict(self.progress), "identity": dict(self.identity)},
                keep_last=self.recipe.run.keep_last,
            )

    def _write_state(self, folder: Path) -> None:
        for group in self._trained_groups():
            group.call("save", str(folder))
        if self._curriculum is not None:
            save_tensors(folder / _CURRICULUM_FILE, self._curriculum.state())
        if self._replay is not None:
            self._replay.save(folder)
