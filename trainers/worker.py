"""The worker: one process of a group, and the roles that live in it.

A worker does what it is told by name (`group.call("update", ...)`) and does not know whether it runs in the
controller's process or in a Ray actor. Here: the methods and what each role needs. Not here: who calls them
(`rlhf.trainers.roles`), formulas, and how processes come to be (`rlhf.runtime`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from rlhf.checkpoint import load_tensors, save_tensors
from rlhf.faults import at_step, fault_point
from rlhf.logprobs import batch_logprobs
from rlhf.losses import Sums, policy_loss, sft_loss
from rlhf.models import load_model, load_tokenizer, probe_exactness, save_model
from rlhf.process import ProcessInfo
from rlhf.recipe.schema import Recipe
from rlhf.records import Batch
from rlhf.rollout import Completion, Engine, EngineConfig, Request
from rlhf.trainers.deepspeed_engine import TrainingEngine, UpdateStats, init_process, stand_in
from rlhf.trainers.weights import WeightMethods, WeightSink, WeightSource

TENSORS_FILE = "trainer.safetensors"
SCALARS_FILE = "trainer.json"


class Worker(WeightMethods):
    """One process and its roles.

    `total_updates` is the number of optimiser steps of the stage: the learning rate is a function of it. `model` and
    `tokenizer` are objects handed over by the Python API; otherwise both come from the recipe.
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
        self.info, self.recipe = info, recipe
        self.tokenizer = tokenizer or load_tokenizer(recipe.model, recipe.tokenizer)
        self._model_object = model
        self.actor: TrainingEngine | None = None
        self.reference: torch.nn.Module | None = None
        self.engine: Engine | None = None
        if "actor" in roles:
            self.actor = TrainingEngine(
                self._load(trainable=True),
                recipe.trainer,
                dtype=recipe.model.dtype,
                total_updates=total_updates,
                info=info,
            )
            # Unmerged: a rollout group builds the same model, adapters included, and holds the same bits.
            self._source = WeightSource(lambda: self.actor.named_full_weights(merged=False), rank=info.rank)
        if "reference" in roles:
            self.reference = self._load(trainable=False)
        if "rollout" in roles:
            self._make_rollout()

    def _load(self, *, trainable: bool) -> torch.nn.Module:
        return load_model(
            self.recipe.model,
            self.tokenizer,
            seed=self.recipe.run.seed,
            device=self.info.device,
            trainable=trainable,
            model=self._model_object,
            invariant=self.recipe.runtime.deterministic,
        )

    def _make_rollout(self) -> None:
        """The engine runs the actor's own tensors where they are whole, else a copy that publishing keeps equal."""
        shared = self.actor is not None and self.actor.weights_are_whole
        # A copy has the actor's structure, adapters included, so that both compute the same bits.
        model = self.actor.module if shared else self._load(trainable=self.recipe.model.lora is not None)
        self._sink = None if shared else WeightSink(model)
        r = self.recipe.rollout
        config = EngineConfig(
            page_tokens=r.page_tokens,
            cache_tokens=r.cache_tokens,
            max_batch_tokens=r.max_batch_tokens,
            max_sequences=r.max_sequences,
            prefix_cache=r.prefix_cache,
        )
        self.engine = Engine(model, config)

    # -- every role ----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Facts for the log: number of parameters and of trained ones, exactness of the engine on this machine."""
        model = self.actor.module if self.actor else self.reference if self.reference is not None else self.engine.model
        facts: dict[str, Any] = {
            "device": self.info.device,
            "parameters": sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in model.parameters()),
        }
        if self.engine is not None:
            facts["exactness"] = probe_exactness(self.engine.model)
        return facts

    def set_step(self, step: int) -> None:
        """Tell this process's fault points where the run is."""
        at_step(step)

    # -- rollout -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of every request, in their order."""
        if self._sink is not None:
            self._sink.check_clean()
        self.engine.wake()
        completions = self.engine.generate(requests)
        if self.info.device != "cpu" and self.actor is not None:
            self.engine.sleep()
        return completions

    def rollout_stats(self) -> dict[str, float]:
        return dict(self.engine.stats)

    # -- actor and reference -------------------------------------------------------------------------------------

    def score(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probs of the response tokens under the actor, (B, T) fp32 on the CPU for each micro-batch."""
        return self._logprobs(self.actor.module, micro_batches)

    def score_reference(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probs of the response tokens under the reference, (B, T) fp32 on the CPU for each micro-batch."""
        return self._logprobs(self.reference, micro_batches)

    def _logprobs(self, model: torch.nn.Module, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        scores = []
        with torch.no_grad():
            for micro in micro_batches:
                # Under ZeRO-3 every process takes part in every forward, one without rows too.
                on_device = (micro if len(micro) else stand_in(micro)).to(self.info.device)
                logprobs, _ = batch_logprobs(model, on_device, temperature=self.recipe.rollout.temperature)
                scores.append(logprobs[: len(micro)].cpu())
        return scores

    def update(self, micro_batches: Sequence[Batch], loss: str) -> UpdateStats:
        """One optimiser step on this process's share. `loss` is "policy" or "sft"."""
        loss_fn = {"policy": self._policy_loss, "sft": self._sft_loss}[loss]
        moved = [micro.to(self.info.device) for micro in micro_batches]
        return self.actor.update(moved, loss_fn)

    def _policy_loss(self, model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, Sums]:
        a = self.recipe.algorithm
        logprobs, entropy = batch_logprobs(model, micro, temperature=self.recipe.rollout.temperature, entropy=True)
        return policy_loss(
            micro,
            logprobs,
            entropy,
            objective=a.objective,
            aggregation=a.aggregation,
            clip_low=a.clip_low,
            clip_high=a.clip_high,
            kl_coef=a.kl_coef,
            kl_estimator=a.kl_estimator,
            entropy_coef=a.entropy_coef,
            constant_length=self.recipe.rollout.max_response_tokens,
        )

    def _sft_loss(self, model: torch.nn.Module, micro: Batch) -> tuple[torch.Tensor, Sums]:
        logprobs, _ = batch_logprobs(model, micro, temperature=1.0)
        return sft_loss(micro, logprobs)

    # -- weights ---------------------------------------------------------------------------------------------------

    def set_version(self, version: int) -> None:
        """New weights are in place: the engine forgets what it cached under the old ones."""
        if self.engine is None:
            return
        if self.actor is not None and self._sink is not None:  # same group, but the actor's weights are split
            self._sink.copy_from(self.actor.named_full_weights(merged=False), version=version)
        self.engine.set_version(version)

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Write the actor's whole state into `folder` (collective; process 0 writes)."""
        tensors, scalars = self.actor.state_dict()
        if self.info.rank == 0:
            save_tensors(Path(folder) / TENSORS_FILE, tensors)
            fault_point("checkpoint.write")
            (Path(folder) / SCALARS_FILE).write_text(json.dumps(scalars, indent=1))

    def load(self, folder: str) -> None:
        """Take the actor's whole state from `folder`; another number of processes may have written it."""
        scalars = json.loads((Path(folder) / SCALARS_FILE).read_text())
        self.actor.load_state(load_tensors(Path(folder) / TENSORS_FILE), scalars)

    def export(self, folder: str) -> None:
        """Write the actor as a Hugging Face folder (collective; process 0 writes)."""
        weights = dict(self.actor.named_full_weights())
        if self.info.rank == 0:
            save_model(self.actor.module, self.tokenizer, folder, weights=weights)

    def close(self) -> None:
        if self.actor is not None:
            self.actor.destroy()
        self.actor = self.reference = self.engine = self._sink = self._source = None
        gc.collect()
