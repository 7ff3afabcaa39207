"""The worker: one process of a group, and the roles that live in it.

A worker does what it is told by name (`group.call("update", ...)`) and does not know whether it runs in the
controller's process or in a Ray actor. Here: the methods and what each role needs. Not here: who calls them
(`rlhf.trainers.roles`), formulas, and how processes come to be (`rlhf.runtime`).
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from rlhf.checkpoint import load_tensors, save_tensors
from rlhf.faults import at_step, fault_point
from rlhf.kernels import form, native
from rlhf.logprobs import batch_logprobs, batch_top_logprobs
from rlhf.models import load_model, load_tokenizer, probe_exactness, save_model
from rlhf.models.linear import weights_changed
from rlhf.models.parallel import TensorParallel, split_rows
from rlhf.models.scalar import (
    is_scalar_model,
    load_scalar_model,
    reward_scale,
    scale_of_scores,
    step_separator,
    store_reward_scale,
    store_step_separator,
)
from rlhf.models.value_head import add_value_head, is_of_value_head, save_value_head
from rlhf.process import ProcessInfo
from rlhf.recipe import rules
from rlhf.recipe.rules import SCORING_MODELS
from rlhf.recipe.schema import ModelConfig, Recipe, TokenizerConfig, TrainerConfig
from rlhf.records import Batch
from rlhf.reward import JudgeReader
from rlhf.rollout import Completion, Engine, EngineConfig, Request
from rlhf.trainers.deepspeed_engine import TrainingEngine, UpdateStats, init_process, stand_in
from rlhf.trainers.forward import POLICY_LOSSES, TEACHER_LOSSES, loss_function
from rlhf.trainers.handover import HandoverMethods
from rlhf.trainers.moving_reference import MovingReference
from rlhf.trainers.weights import WeightMethods, WeightSink, WeightSource
from rlhf.values import batch_logprobs_and_values, batch_rewards, batch_step_scores, batch_values

_REFERENCE_FILE = "reference.safetensors"  # in a checkpoint, where the reference moves


class Worker(WeightMethods, HandoverMethods):
    """One process and its roles.

    `total_updates` is the number of optimiser steps of the stage: the learning rate is a function of it, and of those in
    which the model learns. `model` and `tokenizer` are objects handed over by the Python API; otherwise both come from
    the recipe.
    """

    def __init__(
        self,
        info: ProcessInfo,
        *,
        recipe: Recipe,
        roles: Sequence[str],
        threads: int,
        total_updates: int,
        model: torch.nn.Module | None = None,
        tokenizer: Any = None,
    ) -> None:
        init_process(info, threads=threads, timeout_s=recipe.runtime.call_timeout_s)
        transformers.utils.logging.disable_progress_bar()  # the terminal has bars of its own
        self.info, self.recipe, self._total_updates = info, recipe, total_updates
        self.tokenizer = tokenizer or load_tokenizer(recipe.model, recipe.tokenizer)
        self._model_object = model
        self._average_shown: contextlib.ExitStack | None = None  # open while the actor has its average
        self._trained: dict[str, TrainingEngine] = {}  # actor, critic
        self._frozen: dict[str, torch.nn.Module] = {}  # reference, reward, teacher
        self._sources, self._sinks = {}, {}  # to and from other roles: rollout, reference
        self._moving: MovingReference | None = (
            None  # where the reference is an average of the actor's weights
        )
        self.engine: Engine | None = None
        self._opponent: Engine | None = None  # samples from the reference
        make = {
            "actor": self._make_actor,
            "critic": self._make_critic,
            "reference": self._make_reference,
            "reward": self._make_reward,
            "judge": self._make_judge,
            "teacher": self._make_teacher,
            "rollout": self._make_rollout,
        }
        for role in make:  # in this order: a later role may share an earlier one's weights
            if role in roles:
                make[role]()

    # -- making the roles ------------------------------------------------------------------------------------------

    @property
    def actor(self) -> TrainingEngine | None:
        return self._trained.get("actor")

    def _make_actor(self) -> None:
        recipe = self.recipe
        scores = recipe.method in SCORING_MODELS
        model = (
            self._scalar(recipe.model, head="new", trainable=True) if scores else self._causal(trainable=True)
        )
        if recipe.shares_trunk:
            add_value_head(model, recipe.model.path)
        own_updates = self._total_updates - rules.pretraining_updates(recipe)
        actor = self._trained["actor"] = self._training(model, recipe.trainer, own_updates)
        # Unmerged: a rollout group builds the same model, adapters included, and holds the same bits.
        as_is = WeightSource(
            self._policy_weights,
            rank=self.info.rank,
            named_trained=(lambda: self._policy_weights(trained_only=True))
            if actor.has_frozen_weights
            else None,
        )
        plain = WeightSource(self._plain_policy_weights, rank=self.info.rank)
        self._sources = {"rollout": as_is, "reference": plain if self._averages else as_is}

    def _policy_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """The actor's weights as another process or role holds them: adapters apart, without a value head."""
        weights = self.actor.named_full_weights(merged=False, trained_only=trained_only)
        return ((name, weight) for name, weight in weights if not is_of_value_head(name))

    def _plain_policy_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same as those of a plain model, adapters merged, in fp32."""
        weights = self.actor.named_full_weights(exact=True)
        return ((name, weight.float()) for name, weight in weights if not is_of_value_head(name))

    @property
    def _averages(self) -> bool:
        """Whether the reference is an average of plain weights; else it is what it was, or the actor's copy. One that
        starts from a folder has no adapters to copy the actor's into."""
        config = self.recipe.reference
        foreign = config.path is not None and self.recipe.model.lora is not None
        return config.update_every is not None and (config.update_mix < 1 or foreign)

    def _make_critic(self) -> None:
        """From a reward model where there is one (its head says what is good), else from the actor's start."""
        recipe = self.recipe
        path = recipe.critic.path or (recipe.reward_model.path if recipe.reward_model else None)
        if recipe.critic.path is not None:  # that of the reward model is checked where that is made
            self._same_tokenizer(recipe.critic.path, "critic.path")
        config = _other_model(recipe.model, path)
        head = "load" if path is not None and is_scalar_model(config) else "zero"
        own = {
            "lr": recipe.critic.lr,
            "freeze": [],
            "layer_lr_decay": None,
            "ema_decay": None,
            "neftune_alpha": None,
        }
        rewards, scale, shift = recipe.reward_model, 1.0, 0.0
        if head == "load" and rewards is not None and path == rewards.path:
            scale, shift = scale_of_scores(config, weight=rewards.weight, normalize=rewards.normalize)
        model = self._scalar(config, head=head, trainable=True, scale=scale, shift=shift)
        config = recipe.trainer.model_copy(update=own)
        self._trained["critic"] = self._training(model, config, self._total_updates)

    def _make_reference(self) -> None:
        """With LoRA beside the actor, and where it stays as it is: the actor with its adapters switched off. Where its
        log-probs are cached it is loaded when they are asked for."""
        recipe = self.recipe
        apart = recipe.reference.path is not None or recipe.reference.update_every is not None
        beside = self.actor is not None and self.actor.weights_are_whole
        if recipe.reference.path is not None:
            self._same_tokenizer(recipe.reference.path, "reference.path")
        is_own = apart or recipe.model.lora is None or not beside
        if is_own and not rules.reference_is_cached(recipe):
            self._load_reference()
        if rules.reference_samples(recipe):
            self._opponent = self._engine(self._reference)

    @property
    def _reference(self) -> torch.nn.Module:
        """What is the reference within `_as_reference`."""
        return self._frozen["reference"] if "reference" in self._frozen else self.actor.module

    def _load_reference(self) -> None:
        recipe = self.recipe
        copies = recipe.reference.update_every is not None and not self._averages
        model = self._causal(
            _other_model(recipe.model, recipe.reference.path),
            trainable=copies
            and recipe.model.lora is not None,  # then it has the actor's adapters, to be replaced
        )
        self._frozen["reference"] = model
        if copies:
            self._sinks["reference"] = WeightSink(model)
        elif self._averages:
            self._moving = MovingReference(model)

    def _make_reward(self) -> None:
        path = self.recipe.reward_model.path
        self._same_tokenizer(path, "reward_model.path")
        self._frozen["reward"] = self._scalar(
            _other_model(self.recipe.model, path), head="load", trainable=False
        )

    def _make_judge(self) -> None:
        """With the tokenizer in its own folder: it reads text, not the actor's tokens."""
        judge = self.recipe.judge
        config = _other_model(self.recipe.model, judge.path)
        self._judge = JudgeReader(load_tokenizer(config, TokenizerConfig()), judge)
        self._frozen["judge"] = load_model(config, self._judge.tokenizer, trainable=False, **self._options())

    def _make_teacher(self) -> None:
        path = self.recipe.teacher.path
        self._same_tokenizer(path, "teacher.path")
        self._frozen["teacher"] = self._causal(_other_model(self.recipe.model, path), trainable=False)

    def _make_rollout(self) -> None:
        """The engine runs the actor's own tensors where they are whole, else a copy that publishing keeps equal, or this
        process's part of one."""
        shared = self.actor is not None and self.actor.weights_are_whole
        # A copy has the actor's structure, adapters included, so that both compute the same bits.
        lora = self.recipe.model.lora is not None
        model = (
            self.actor.module if shared else self._causal(trainable=lora, parallel=self._beside_this_one())
        )
        if not shared:
            self._sinks["rollout"] = WeightSink(model, split_rows(model))
        self.engine = self._engine(model)

    def _beside_this_one(self) -> TensorParallel | None:
        """The processes that run one engine with this one: as many neighbours as rollout.tensor_parallel says."""
        size, limit = (
            self.recipe.rollout.tensor_parallel,
            timedelta(seconds=self.recipe.runtime.call_timeout_s),
        )
        if size == 1:
            return None
        firsts = range(0, self.info.world_size, size)
        groups = [dist.new_group(list(range(first, first + size)), timeout=limit) for first in firsts]
        return TensorParallel(groups[self.info.rank // size])

    def _engine(self, model: torch.nn.Module) -> Engine:
        r = self.recipe.rollout
        config = EngineConfig(
            page_tokens=r.page_tokens,
            cache_tokens=r.cache_tokens,
            max_batch_tokens=r.max_batch_tokens,
            max_sequences=r.max_sequences,
            prefix_cache=r.prefix_cache,
            policy=r.order,
            preemption=r.preemption,
            kv_dtype=r.kv_dtype,
            weights=r.weights,
            draft_tokens=r.draft_tokens,
            cuda_graphs=r.cuda_graphs,
        )
        return Engine(model, config)

    def _training(self, model: torch.nn.Module, config: TrainerConfig, updates: int) -> TrainingEngine:
        return TrainingEngine(
            model,
            config,
            dtype=self.recipe.model.dtype,
            total_updates=updates,
            info=self.info,
            seed=self.recipe.run.seed,
        )

    def _causal(
        self,
        config: ModelConfig | None = None,
        *,
        trainable: bool,
        parallel: TensorParallel | None = None,
    ) -> torch.nn.Module:
        own = config is None or config == self.recipe.model
        return load_model(
            config or self.recipe.model,
            self.tokenizer,
            trainable=trainable,
            model=self._model_object if own else None,
            parallel=parallel,
            **self._options(),
        )

    def _scalar(self, config: ModelConfig, *, head: str, trainable: bool, **scores: float) -> torch.nn.Module:
        own = config == self.recipe.model
        return load_scalar_model(
            config,
            self.tokenizer,
            head=head,
            trainable=trainable,
            model=self._model_object if own else None,
            **self._options(),
            **scores,
        )

    def _options(self) -> dict[str, Any]:
        return {
            "seed": self.recipe.run.seed,
            "device": self.info.device,
            "invariant": self.recipe.runtime.deterministic,
        }

    def _same_tokenizer(self, path: str, key: str) -> None:
        """Raise ValueError unless the model at `path` reads tokens as this run writes them."""
        other = load_tokenizer(ModelConfig(path=path), TokenizerConfig())
        own, theirs = self.tokenizer.get_vocab(), other.get_vocab()
        if own != theirs:
            example = next(t for t in sorted(own.keys() | theirs.keys()) if own.get(t) != theirs.get(t))
            raise ValueError(
                f"{key}={path} has another tokenizer than the model that is trained: token {example!r} is number "
                f"{theirs.get(example)} there and {own.get(example)} here; use a model with the same vocabulary"
            )

    # -- every role ----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Facts: number of parameters, bytes of a checkpoint and of the model, in what form the kernels run (`forms`: which
        ran in the engine's probe) and how exact the engine is here."""
        models = [t.module for t in self._trained.values()] or [*self._frozen.values()]
        models += [self.engine.model] if self.engine is not None else []
        parameters = list(models[0].parameters()) if models else []  # a reference may wait to be loaded
        sizes = [p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in parameters]
        facts: dict[str, Any] = {
            "device": self.info.device,
            "kernels": native.form(self.info.device),
            "parameters": sum(sizes),
            "model_bytes": sum(n * p.element_size() for n, p in zip(sizes, parameters, strict=True)),
            "checkpoint_bytes": sum(t.state_bytes for t in self._trained.values()),
        }
        if self._moving is not None:
            facts["checkpoint_bytes"] += self._moving.state_bytes
        elif "reference" in self._sinks:
            facts["checkpoint_bytes"] += sum(_num_bytes(p) for p in self._frozen["reference"].parameters())
        if self.engine is not None:
            form.forget()
            facts["exactness"] = probe_exactness(self.engine.model)
            facts["forms"] = form.told()
        return facts

    def set_step(self, step: int) -> None:
        """Tell this process's fault points where the run is."""
        at_step(step)

    # -- rollout -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], role: str = "rollout") -> list[list[Completion]]:
        """Completions of every request, in their order, of the policy or ("reference") of the reference."""
        engine = self._begin_sampling(role)
        with self._as_reference() if role == "reference" else contextlib.nullcontext():
            completions = engine.generate(requests)
        self._end_sampling(engine)
        return completions

    def _begin_sampling(self, role: str) -> Engine:
        if role in self._sinks:
            self._sinks[role].check_clean()
        engine = self._sampler(role)
        engine.wake()
        return engine

    def _end_sampling(self, engine: Engine) -> None:
        alone = self.actor is None and None in (self.engine, self._opponent)
        if self.info.device != "cpu" and not alone:
            engine.sleep()

    def rollout_stats(self, role: str = "rollout") -> dict[str, float]:
        """Of the last `generate`, or what came after `begin_apart`; see `Sampler.take_stats`."""
        return dict(self._sampler(role).stats)

    def _sampler(self, role: str) -> Engine:
        return self._opponent if role == "reference" else self.engine

    def _as_reference(self) -> contextlib.AbstractContextManager[Any]:
        """Within it the actor is the reference, where that is the actor without its adapters."""
        own = "reference" in self._frozen
        return contextlib.nullcontext() if own else self.actor.module.disable_adapter()

    def set_reference_version(self, version: int) -> None:
        """The reference has moved: what samples from it forgets what it cached. `version` is the actor's at that time."""
        if self._opponent is not None:
            self._opponent.set_version(version)

    # -- scoring -------------------------------------------------------------------------------------------------

    def score(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probs of the response tokens under the actor, (B, T) fp32 on the CPU for each micro-batch."""
        return self._logprobs(self.actor.module, micro_batches)

    def score_with_values(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probs and values of one pass, for an actor with a value head: (B, T, 2) fp32 on the CPU for each
        micro-batch."""
        temperature = self.recipe.policy_temperature

        def both(micro: Batch) -> torch.Tensor:
            logprobs, _, values = batch_logprobs_and_values(self.actor.module, micro, temperature=temperature)
            return torch.stack([logprobs, values], -1)

        return self._each(micro_batches, both)

    def score_reference(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probs of the response tokens under the reference, (B, T) fp32 on the CPU for each micro-batch."""
        if rules.reference_is_cached(self.recipe) and "reference" not in self._frozen:
            self._load_reference()
        with self._as_reference():
            return self._logprobs(self._reference, micro_batches)

    def release_reference(self) -> None:
        """Let the reference's model go: nothing will be compared with it again."""
        self._frozen.pop("reference", None)
        gc.collect()
        if self.info.device != "cpu":
            torch.cuda.empty_cache()

    def score_teacher(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probs of the response tokens under the teacher, (B, T) fp32 on the CPU for each micro-batch."""
        return self._logprobs(self._frozen["teacher"], micro_batches)

    def score_values(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """The critic's values, (B, T) fp32 on the CPU for each micro-batch."""
        return self._each(micro_batches, lambda micro: batch_values(self._trained["critic"].module, micro))

    def score_rewards(self, micro_batches: Sequence[Batch], role: str) -> list[torch.Tensor]:
        """Scores of whole responses, (B,) fp32 on the CPU for each micro-batch; `role` is "reward" or "actor"."""
        model = self._frozen["reward"] if role == "reward" else self.actor.module
        mean, std = 0.0, 1.0
        if role == "reward" and self.recipe.reward_model.normalize:
            mean, std = reward_scale(model)
        return self._each(micro_batches, lambda micro: (batch_rewards(model, micro) - mean) / std)

    def score_steps(self, micro_batches: Sequence[Batch], role: str) -> list[torch.Tensor]:
        """Scores (logits) at the steps' last tokens, which the loss mask marks, (B, T) fp32 on the CPU for each
        micro-batch; `role` is "reward" or "actor"."""
        model = self._frozen["reward"] if role == "reward" else self.actor.module
        return self._each(micro_batches, lambda micro: batch_step_scores(model, micro, micro.loss_mask))

    def step_separator(self) -> str | None:
        """What ends every step that the reward model judges; None where it judges whole responses."""
        return step_separator(self._frozen["reward"])

    def store_step_separator(self, separator: str) -> None:
        """Keep what ends a step in the actor's configuration, which an export writes."""
        store_step_separator(self.actor.module, separator)

    def store_reward_scale(self, mean: float, std: float) -> None:
        """Keep the mean and spread of the actor's scores in its configuration, which an export writes."""
        store_reward_scale(self.actor.module, mean=mean, std=std)

    def judge(self, texts: Sequence[str], max_tokens: int) -> torch.Tensor:
        """(n, 2) fp32 on the CPU: for each text the probability of the good verdict, and that of either; NaN where it is
        longer than the judge's context. `max_tokens` bounds a forward pass."""
        return self._judge.ask(self._frozen["judge"], texts, max_tokens=max_tokens, device=self.info.device)

    def teacher_top(self, micro_batches: Sequence[Batch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The teacher's likeliest tokens at every loss token: (B, T, K) ids and (B, T, K + 1) log-probs, theirs and that of
        any other token, on the CPU, for each micro-batch that has rows."""
        d, found = self.recipe.distill, []
        for micro in filter(len, micro_batches):
            with torch.no_grad():
                ids, logprobs = batch_top_logprobs(
                    self._frozen["teacher"],
                    micro.to(self.info.device),
                    targets=micro.loss_mask.to(self.info.device),
                    temperature=d.temperature,
                    top_k=d.top_k,
                )
            found.append((ids.cpu(), logprobs.cpu()))
        return found

    def _logprobs(self, model: torch.nn.Module, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        temperature = self.recipe.policy_temperature
        return self._each(
            micro_batches, lambda micro: batch_logprobs(model, micro, temperature=temperature)[0]
        )

    def _each(
        self, micro_batches: Sequence[Batch], score: Callable[[Batch], torch.Tensor]
    ) -> list[torch.Tensor]:
        scores = []
        with torch.no_grad():
            for micro in micro_batches:
                # Under ZeRO-3 every process takes part in every forward, one without rows too.
                on_device = (micro if len(micro) else stand_in(micro)).to(self.info.device)
                scores.append(score(on_device)[: len(micro)].cpu())
        return scores

    # -- training ------------------------------------------------------------------------------------------------

    def update(
        self, role: str, parts: Sequence[tuple[Batch, str]], changing: Mapping[str, float]
    ) -> UpdateStats:
        """One optimiser step of the actor or the critic on this process's share: micro-batches and their losses.

        `changing` holds what the policy loss takes from the step and not from the recipe."""
        micros = [micro.to(self.info.device) for micro, _ in parts]
        losses = [
            loss_function(name, self.recipe, **(changing if name in POLICY_LOSSES else self._beside(name)))
            for _, name in parts
        ]
        return self._trained[role].update(micros, losses)

    def _beside(self, loss: str) -> dict[str, torch.nn.Module]:
        """The models that a loss reads beside the one that is trained."""
        exact = loss in TEACHER_LOSSES and self.recipe.distill.top_k == "all"
        return {"teacher": self._frozen["teacher"]} if exact else {}

    def mix_reference(self, mix: float, *, beside_actor: bool) -> None:
        """Move the reference towards what was published to it, or beside the actor towards the actor itself."""
        if self._moving is not None and beside_actor:
            self._moving.mix(self._plain_policy_weights(), mix)
        elif self._moving is not None:
            self._moving.mix_landed(mix)
            del self._sinks["reference"]
        else:
            if beside_actor:
                self._sinks["reference"].copy_from(self._policy_weights(), version=self.actor.version)
            weights_changed(self._frozen["reference"])

    def before_mix(self) -> None:
        """Make room for the weights that a publish is about to bring, beside the reference's own."""
        if self._moving is not None:
            self._sinks["reference"] = self._moving.land()

    # -- weights ---------------------------------------------------------------------------------------------------

    def set_version(self, version: int) -> None:
        """New weights are in place: the engine forgets what it cached under the old ones."""
        if self.engine is None:
            return
        sink = self._sinks.get("rollout")
        if self.actor is not None and sink is not None:  # same group, but the actor's weights are split
            rest = sink.has_copied  # what is frozen came with the first copy
            sink.copy_from(self._policy_weights(trained_only=rest), version=version)
        self.engine.set_version(version)

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Write the whole state of every role that changes into `folder` (collective; process 0 writes)."""
        for role, trained in self._trained.items():
            tensors, scalars = trained.state_dict()
            if self.info.rank == 0:
                save_tensors(Path(folder) / f"{role}.safetensors", tensors)
                fault_point("checkpoint.write")
                (Path(folder) / f"{role}.json").write_text(json.dumps(scalars, indent=1))
        if self.info.rank == 0 and (reference := self._reference_state()):
            save_tensors(Path(folder) / _REFERENCE_FILE, reference)

    def load(self, folder: str) -> None:
        """Take the state that `save` wrote; another number of processes may have written it."""
        for role, trained in self._trained.items():
            scalars = json.loads((Path(folder) / f"{role}.json").read_text())
            trained.load_state(load_tensors(Path(folder) / f"{role}.safetensors"), scalars)
        if self._moving is not None:
            self._moving.load_state(load_tensors(Path(folder) / _REFERENCE_FILE))
        elif "reference" in self._sinks:
            _set_weights(self._frozen["reference"], load_tensors(Path(folder) / _REFERENCE_FILE))

    def _reference_state(self) -> Mapping[str, torch.Tensor]:
        """Of a reference in this process that moves; {} where there is none."""
        if self._moving is not None:
            return self._moving.state_dict()
        return _copy_of(self._frozen["reference"]) if "reference" in self._sinks else {}

    def export(self, folder: str) -> None:
        """Write the actor, or the moving average of its weights if there is one, as a Hugging Face folder (collective;
        process 0 writes)."""
        hidden = self.recipe.trainer.ema_decay is not None and self._average_shown is None
        with self.actor.averaged_weights() if hidden else contextlib.nullcontext():
            weights = dict(self.actor.named_full_weights())
            if self.info.rank == 0:
                plain = {name: w for name, w in weights.items() if not is_of_value_head(name)}
                save_model(self.actor.module, self.tokenizer, folder, weights=plain)
                save_value_head(weights, folder)

    def show_average(self, show: bool) -> None:
        """Give the actor the moving average of its weights, or its own again (collective)."""
        if show:
            self._average_shown = contextlib.ExitStack()
            self._average_shown.enter_context(self.actor.averaged_weights())
        else:
            self._average_shown.close()
            self._average_shown = None

    def close(self) -> None:
        for trained in self._trained.values():
            trained.destroy()
        self._trained, self._frozen, self._sources, self._sinks = {}, {}, {}, {}
        self.engine = self._opponent = self._moving = None
        gc.collect()


def _other_model(model: ModelConfig, path: str | None) -> ModelConfig:
    """The recipe's model section for another model beside it: same type and options, other weights, no adapter."""
    if path is None:
        return model
    return ModelConfig(path=path, dtype=model.dtype, gradient_checkpointing=model.gradient_checkpointing)


def _num_bytes(p: torch.Tensor) -> int:
    return p.numel() * p.element_size()


def _copy_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


@torch.no_grad()
def _set_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        p.copy_(weights[name])
    weights_changed(model)
