"""A model under DeepSpeed: one optimiser step at a time, the full weights, and the whole state as plain
tensors.

Here: the process group, DeepSpeed's configuration, the step, the moving average of the weights, and reading and
writing the state. Not here: optimisers and the learning rate (`rlhf.trainers.optimizers`), losses (a function that is
passed in), batches, checkpoints' files (`rlhf.checkpoint`), and who calls.

What DeepSpeed is not given to decide: the learning rate is a function of the update's number, losses arrive
already divided by the step's global count, and the state leaves as full fp32 tensors by parameter name,
whatever the ZeRO stage and the number of processes. A step whose loss or gradient is not finite on any
process moves nothing on any of them; nor does one in which no token counts, whose zero gradient would still
let Adam's momentum and weight decay move the weights.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rlhf.faults import fault_point
from rlhf.models.linear import weights_changed
from rlhf.process import ProcessInfo
from rlhf.recipe.schema import TrainerConfig
from rlhf.records import Batch
from rlhf.trainers.neftune import EmbeddingNoise
from rlhf.trainers.optimizers import (
    WHOLE_MATRICES,
    freeze,
    initial_state,
    lr_at,
    make_optimizer,
    state_shapes,
)

Sums = dict[str, torch.Tensor]
LossFn = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, Sums]]

_AVERAGE = "ema"  # kept beside the optimiser's own state, split and saved like it
_GATHER_ELEMENTS = 1 << 27  # parameters gathered at once under ZeRO-3
_CPU_BUCKET_ELEMENTS = 1 << 24
_GPU_BUCKET_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class UpdateStats:
    """One optimiser step, the same on every process."""

    loss: float  # the step's loss over all micro-batches and processes
    grad_norm: float  # global 2-norm before clipping; not finite where the step was skipped
    lr: float  # learning rate of this step
    skipped: bool  # nothing has moved: a loss or gradient was not finite, or the step was empty
    sums: Sums  # 0-dim float64 on the CPU: the loss function's numbers over the whole step; {} if empty
    empty: bool = False  # no token counts in the step's loss, on any process: nothing was computed
    unchanged: tuple[
        str, ...
    ] = ()  # trained parameters that the first steps of a run did not move; said once


# -- processes -----------------------------------------------------------------------------------------------


def init_process(info: ProcessInfo, *, threads: int, timeout_s: float) -> None:
    """Join this process to its group: CPU threads, device, torch.distributed and DeepSpeed.

    Once per process; a later call with the same rank and size changes the threads only. Raises ValueError for
    another place in another group: a process belongs to one for its whole life.
    """
    torch.set_num_threads(threads)
    if dist.is_initialized():
        here = (dist.get_rank(), dist.get_world_size())
        if here != (info.rank, info.world_size):
            raise ValueError(
                f"this process is rank {here[0]} of {here[1]} already and cannot become rank {info.rank} of "
                f"{info.world_size} (group {info.group!r}); start another process"
            )
        return
    os.environ.update(
        RANK=str(info.rank),
        WORLD_SIZE=str(info.world_size),
        LOCAL_RANK=str(info.local_rank),
        MASTER_ADDR=info.master_addr,
        MASTER_PORT=str(info.master_port),
        DS_ACCELERATOR=info.device,
    )
    if info.device == "cuda":
        torch.cuda.set_device(info.local_rank)
    else:  # without this, ZeRO-3 forks a numactl in every step to count CPUs
        os.environ["LOCAL_SIZE"] = str(info.world_size)
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl" if info.device == "cuda" else "gloo"
    place = dict(rank=info.rank, world_size=info.world_size, timeout=timeout)
    if info.world_size == 1:
        hook = sys.excepthook
        dist.init_process_group(backend, store=dist.HashStore(), **place)
        sys.excepthook = hook  # torch's own puts "[rank0]:" before every line of a traceback
    else:
        dist.init_process_group(backend, init_method=f"tcp://{info.master_addr}:{info.master_port}", **place)
    _start_deepspeed(backend)


def _start_deepspeed(backend: str) -> None:
    """Make DeepSpeed use the process group that exists, without compiling an operator and without chatter."""
    # Imported late: DeepSpeed chooses its accelerator from the environment while it loads.
    import deepspeed
    import deepspeed.ops

    # What it may compile. Asked for, it would run compilers for seconds to find out, and then build a
    # communication operator for a minute; nothing here needs any of it.
    deepspeed.ops.__compatible_ops__ = {}
    if not _debugging():
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed calls these by their former names, once a parameter.
        old = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
        warnings.filterwarnings("ignore", message=old, category=FutureWarning)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _debugging() -> bool:
    """RLHF_DEBUG=1 lets DeepSpeed talk."""
    return bool(os.environ.get("RLHF_DEBUG"))


# -- configuration -------------------------------------------------------------------------------------------


def effective_zero_stage(stage: int, dtype: str) -> int:
    """The ZeRO stage that DeepSpeed is run with.

    Stage 0 in bfloat16 becomes 1. For that combination DeepSpeed has only its optimiser of fp16 days, which
    must add micro-batches up in bfloat16. Stage 1 adds in fp32; it, too, keeps whole weights and gradients on
    every process and splits only the fp32 masters and moments, which with one process is no split at all.
    """
    return 1 if stage == 0 and dtype == "bfloat16" else stage


def deepspeed_config(
    config: TrainerConfig, *, dtype: str, info: ProcessInfo, num_trained: int
) -> dict[str, Any]:
    """DeepSpeed's JSON for this trainer. `num_trained` parameters bound the sizes of its buffers."""
    stage = effective_zero_stage(config.zero_stage, dtype)
    on_gpu = info.device == "cuda"
    bucket = min(_GPU_BUCKET_ELEMENTS if on_gpu else _CPU_BUCKET_ELEMENTS, num_trained + num_trained % 2)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": on_gpu and info.world_size > 1,
        "contiguous_gradients": on_gpu,  # copies every gradient, against a GPU's fragmentation
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        # The real number differs from step to step: boundaries are set by hand and losses are never divided
        # by it. It only has to say "several" where DeepSpeed asks whether it must accumulate.
        "gradient_accumulation_steps": 2,
        "gradient_clipping": config.max_grad_norm if stage else 0.0,  # stage 0: `_step_whole`
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
    }


# -- the engine ----------------------------------------------------------------------------------------------


class TrainingEngine:
    """A model, its optimiser and their state, under DeepSpeed ZeRO 0 to 3 over the processes of one group.

    `model` is an ordinary Hugging Face model (peft's wrapper included) whose weights are all here and the
    same on every process; it is changed in place and belongs to the engine until `destroy`. Parameters that
    need no gradient, or that `config.freeze` names, stay out of the optimiser and its state. `dtype` is that of
    forward and backward; masters, moments and the moving average are fp32. `seed` keys NEFTune's noise.

    Every method except the properties is collective: all processes of the group call it, in the same order.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrainerConfig,
        *,
        dtype: str,
        total_updates: int,
        info: ProcessInfo,
        seed: int,
    ) -> None:
        self._config, self._total, self._info = config, total_updates, info
        self._stage = effective_zero_stage(config.zero_stage, dtype)
        freeze(model, config.freeze)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise ValueError(
                "no parameter of the model needs a gradient; train some weights or add model.lora"
            )
        if config.offload_optimizer and self._stage == 0:
            raise ValueError("trainer.offload_optimizer needs trainer.zero_stage >= 1: ZeRO is what offloads")
        if config.optimizer in WHOLE_MATRICES and self._stage:
            raise ValueError(
                f"trainer.optimizer={config.optimizer} reads whole matrices, which ZeRO flattens: use "
                "trainer.zero_stage: 0 and model.dtype: float32 (bfloat16 always runs under ZeRO 1)"
            )
        self._watched_steps = self._steps_to_watch = _steps_until_all_move(self._trained)
        self._optimizer = make_optimizer(model, config)
        self._groups = [list(group["params"]) for group in self._optimizer.param_groups]
        self._state = self._state_layout()
        self._noise = (
            EmbeddingNoise(model, alpha=config.neftune_alpha, seed=seed) if config.neftune_alpha else None
        )
        num_trained = sum(p.numel() for p in self._trained.values())
        self._engine = self._initialize(
            model, deepspeed_config(config, dtype=dtype, info=info, num_trained=num_trained)
        )
        self._create_state()
        self._at_start: dict[str, int] | None = None
        self.version = 0  # optimiser steps applied
        self.updates = 0  # optimiser steps tried: the learning rate's position
        weights_changed(self.module)

    def _initialize(self, model: torch.nn.Module, config: dict[str, Any]) -> Any:
        import deepspeed

        # Some of its optimisers collect garbage and print the machine's memory a dozen times while they
        # start: let the collections skip what is here already, and the rest go nowhere.
        quiet = contextlib.nullcontext() if _debugging() else contextlib.redirect_stdout(io.StringIO())
        gc.freeze()
        try:
            with quiet:
                engine, *_ = deepspeed.initialize(
                    model=model, optimizer=self._optimizer, config=config, dist_init_required=False
                )
        finally:
            gc.unfreeze()
        return engine

    # -- what it holds ---------------------------------------------------------------------------------------

    @property
    def module(self) -> torch.nn.Module:
        """The model. Under ZeRO-3 its parameters are whole only inside a forward pass."""
        return self._engine.module

    @property
    def model(self) -> torch.nn.Module:
        """What to call for a forward pass, with gradients or without."""
        return self._engine

    @property
    def weights_are_whole(self) -> bool:
        """True if every process holds all weights all the time: not under ZeRO-3."""
        return self._stage < 3

    # -- one step --------------------------------------------------------------------------------------------

    def update(self, micro_batches: Sequence[Batch], loss_fn: LossFn | Sequence[LossFn]) -> UpdateStats:
        """One optimiser step over this process's micro-batches, as many as every other process has.

        `loss_fn`, one for all or one for each, is called as `loss_fn(model, micro)` and returns a scalar already
        divided by the step's global count, so that all micro-batches of all processes add up to the loss, and
        numbers by name which add up too; names ending in _min or _max are reduced to the extreme instead. A
        micro-batch without rows takes part with a stand-in row that counts for nothing.

        A loss or gradient that is not finite on any process skips the step on all: no weight, moment or
        version moves, but the learning rate's position does. So does a step in which no token counts, which
        every process knows without asking the others; no forward pass is made for it. Raises ValueError without
        micro-batches.
        """
        if not micro_batches:
            raise ValueError("update() got no micro-batch; give a process without rows an empty Batch")
        lr = lr_at(self.updates, self._config, self._total)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if not any(micro.num_loss_tokens for micro in micro_batches):
            self.updates += 1
            return UpdateStats(loss=0.0, grad_norm=0.0, lr=lr, skipped=True, sums={}, empty=True)
        loss_fns = [loss_fn] * len(micro_batches) if callable(loss_fn) else loss_fn
        total, collected = self._accumulate(micro_batches, loss_fns)
        fault_point("optimizer.before")
        if self.version == 0 and self._at_start is None:
            self._at_start, self._steps_to_watch = self._fingerprints(), self._watched_steps
        grad_norm, applied = self._step_whole() if self._stage == 0 else self._step_zero()
        self.updates += 1
        self.version += applied
        if applied and self._config.ema_decay is not None:
            self._average(self._config.ema_decay)
        weights_changed(self.module)
        fault_point("optimizer.after")
        loss, sums = self._reduce(total, collected)
        return UpdateStats(
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            skipped=not applied,
            sums=sums,
            unchanged=self._unchanged(had_gradient=applied and grad_norm > 0.0),
        )

    def _accumulate(
        self, micro_batches: Sequence[Batch], loss_fns: Sequence[LossFn]
    ) -> tuple[torch.Tensor, Sums]:
        """Backward of every micro-batch; this process's loss and numbers."""
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        collected: Sums = {}
        for i, (micro, loss_fn) in enumerate(zip(micro_batches, loss_fns, strict=True)):
            self._engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            fault_point("train.forward")
            loss, sums = self._share(micro, loss_fn)
            # DeepSpeed averages over processes; and a bad loss must not leave a finite gradient behind.
            scale = torch.where(torch.isfinite(loss.detach()), float(self._info.world_size), math.nan)
            fault_point("train.backward")
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
            _collect(collected, {name: value.detach().to(total) for name, value in sums.items()})
        return total, collected

    def _share(self, micro: Batch, loss_fn: LossFn) -> tuple[torch.Tensor, Sums]:
        """This micro-batch's part of loss and numbers. Without rows both are empty, but the model has run all the
        same: the other processes wait for this one's share in every exchange that its passes make."""
        shown = micro if len(micro) else stand_in(micro)
        with self._noise.on(shown, self.updates) if self._noise else contextlib.nullcontext():
            loss, sums = loss_fn(self.model, shown)
        if len(micro):
            return loss, sums
        nothing = {n: torch.full_like(s, -_sign(n) * math.inf if _sign(n) else 0.0) for n, s in sums.items()}
        return loss * 0.0, nothing

    def _step_zero(self) -> tuple[float, bool]:
        """Clip and step inside ZeRO, which refuses a global norm that is not finite."""
        self._engine.step()
        applied = self._engine.was_step_applied()
        if not applied and self._config.offload_optimizer and self._stage < 3:
            # DeepSpeed 0.19 forgets these here, and would add the next step's gradients to the bad ones.
            waiting = self._engine.optimizer.averaged_gradients
            waiting.update(dict.fromkeys(waiting))
        return float(self._engine.get_global_grad_norm()), applied

    def _step_whole(self) -> tuple[float, bool]:
        """Clip and step with whole gradients, which DeepSpeed has averaged but would not check."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained.values(), self._config.max_grad_norm))
        if not math.isfinite(norm):
            self._engine.zero_grad()
            return norm, False
        self._engine.step()
        return norm, True

    def _reduce(self, total: torch.Tensor, collected: Sums) -> tuple[float, Sums]:
        """Loss and numbers over all processes."""
        extremes = [name for name in sorted(collected) if _sign(name)]
        plain = [name for name in sorted(collected) if not _sign(name)]
        sums = torch.stack([total, *(collected[n] for n in plain)])
        tops = torch.stack([_sign(n) * collected[n] for n in extremes]) if extremes else None
        if self._info.world_size > 1:
            dist.all_reduce(sums)
            if tops is not None:
                dist.all_reduce(tops, op=dist.ReduceOp.MAX)
        values = dict(zip(plain, sums.cpu()[1:], strict=True))
        if tops is not None:
            values |= {n: _sign(n) * top for n, top in zip(extremes, tops.cpu(), strict=True)}
        return float(sums[0]), {n: values[n] for n in collected}

    # -- what did not move -----------------------------------------------------------------------------------

    def _unchanged(self, *, had_gradient: bool) -> tuple[str, ...]:
        """After the last of the first steps that had a gradient: the trained parameters that are what they were, on every
        process."""
        if self._at_start is None:
            return ()
        self._steps_to_watch -= had_gradient
        if self._steps_to_watch:
            return ()
        before, self._at_start = self._at_start, None
        now = self._fingerprints()
        moved = torch.tensor([before[name] != now[name] for name in before], dtype=torch.int32)
        if self._info.world_size > 1:
            moved = moved.to(self._engine.device)
            dist.all_reduce(moved, op=dist.ReduceOp.MAX)
        return tuple(name for name, m in zip(before, moved.tolist(), strict=True) if not m)

    def _fingerprints(self) -> dict[str, int]:
        """A number for the bits of this process's part of each master."""
        return {name: _fingerprint(self._local_master(p)) for name, p in self._trained.items()}

    def _local_master(self, p: torch.nn.Parameter) -> torch.Tensor:
        if self._stage == 0:
            return p.detach()
        if self._stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            return safe_get_local_fp32_param(p)
        return p.detach()[:0].float() if p._hp_mapping is None else p._hp_mapping.hp_fragment

    # -- the moving average ----------------------------------------------------------------------------------

    def _average(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * weights, each process its part."""
        with torch.no_grad():
            for _, master in self._masters():
                self._optimizer.state[master][_AVERAGE].lerp_(master.detach(), 1.0 - decay)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the model's weights are their moving average over the steps (`trainer.ema_decay`), for an export
        or an evaluation; afterwards they are bit for bit what they were. Raises ValueError if there is none.
        """
        if self._config.ema_decay is None:
            raise ValueError("there is no moving average of the weights; set trainer.ema_decay")
        kept: dict[str, torch.Tensor] = {}
        if self.weights_are_whole:  # under ZeRO-3 they are their masters, rounded
            kept = {name: p.detach().to("cpu", copy=True) for name, p in self._trained.items()}
        try:
            for p in self._trained.values():
                self._set_weight(p, self._full_state(p, _AVERAGE))
            weights_changed(self.module)
            yield
        finally:
            for name, p in self._trained.items():
                self._set_weight(p, kept[name] if kept else self._full_state(p, "master"))
            weights_changed(self.module)

    def _set_weight(self, p: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Give a parameter new values, in the model's type; its master stays."""
        with torch.no_grad(), self._gathered([p], writer=0):
            if self.weights_are_whole or self._info.rank == 0:
                p.data.copy_(value)

    # -- full weights ----------------------------------------------------------------------------------------

    def named_full_weights(
        self, *, merged: bool = True, trained_only: bool = False, exact: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, whole, detached, in the model's dtype, tied ones once; with `trained_only` those that
        the optimiser moves, unmerged.

        With `merged`, a LoRA model is shown as the plain model that it is equivalent to: adapters added to
        the weights they adapt, names without peft's prefixes; `exact` leaves those sums in fp32. Under ZeRO-3 the
        tensors are copies and every process must take them all; otherwise they are the live weights wherever nothing
        was merged.
        """
        module = self.module
        if trained_only:
            yield from self._plain_weights(self._trained)
        elif merged and _is_peft(module):
            yield from self._merged_weights(module.get_base_model(), exact=exact)
        else:
            yield from self._plain_weights(dict(module.named_parameters()))

    @property
    def has_frozen_weights(self) -> bool:
        """Whether some parameters never change."""
        return any(not p.requires_grad for p in self.module.parameters())

    def _merged_weights(self, base: torch.nn.Module, *, exact: bool) -> Iterator[tuple[str, torch.Tensor]]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        adapted = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
        heads = {name: head for name, head in base.named_modules() if isinstance(head, ModulesToSaveWrapper)}
        inside = tuple(f"{name}." for name in (*adapted, *heads))
        plain = {name: p for name, p in base.named_parameters() if not name.startswith(inside)}
        for name, head in heads.items():  # trained whole: peft keeps the first state beside it
            trained = head.modules_to_save[head.active_adapters[0]]
            plain |= {f"{name}.{n}": p for n, p in trained.named_parameters()}
        yield from self._plain_weights(plain)
        for name, layer in adapted.items():
            with self._gathered(list(layer.parameters())):
                own = layer.get_base_layer()
                weights = {f"{name}.{n}": self._own(p) for n, p in own.named_parameters()}
                delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
                merged = own.weight.detach().float() + delta.detach()
                merged = merged if exact else merged.to(own.weight.dtype)
            weights[f"{name}.weight"] = merged
            yield from weights.items()

    def _plain_weights(
        self, parameters: Mapping[str, torch.nn.Parameter]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter as it is, gathered in portions of bounded size."""
        waiting = list(parameters.items())
        while waiting:
            size, portion = 0, []
            while waiting and (not portion or size + self._shape(waiting[0][1]).numel() <= _GATHER_ELEMENTS):
                portion.append(waiting.pop(0))
                size += self._shape(portion[-1][1]).numel()
            with self._gathered([p for _, p in portion]):
                whole = [(name, self._own(p)) for name, p in portion]
            yield from whole

    def _shape(self, parameter: torch.nn.Parameter) -> torch.Size:
        """Its full shape; what ZeRO-3 has split has none of its own."""
        return parameter.shape if self.weights_are_whole else parameter.ds_shape

    def _own(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return parameter.detach() if self.weights_are_whole else parameter.detach().clone()

    def _gathered(self, parameters: list[torch.nn.Parameter], writer: int | None = None) -> Any:
        """Whole parameters inside the context; what rank `writer` changes there is kept by all."""
        if self.weights_are_whole:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)

    # -- state -----------------------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """What `state_dict` holds: masters, the optimiser's moments and the moving average, in fp32."""
        return 4 * sum(shape.numel() for shapes in self._state.values() for shape in shapes.values())

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """(tensors, scalars): the whole training state, independent of ZeRO stage and number of processes.

        Tensors are full, fp32, on the CPU, for every trained parameter: master.<name>, what the optimiser keeps
        (exp_avg.<name>, ...), and ema.<name> if there is a moving average. They are on rank 0; the other processes
        get an empty dict. Scalars: version, updates.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self._trained.items():
            for kind in self._state[name]:
                full = self._full_state(p, kind)
                if self._info.rank == 0:
                    tensors[f"{kind}.{name}"] = full.detach().to("cpu", torch.float32, copy=True)
        return tensors, {"version": self.version, "updates": self.updates}

    def load_state(self, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, int]) -> None:
        """Take over what `state_dict` returned; every process is given all of it.

        The next step is bitwise the one that would have followed the save, with the same number of processes.
        Raises ValueError if names or shapes are not exactly those of this model's trained parameters.
        """
        self._check_state(tensors)
        with torch.no_grad():
            for name, p in self._trained.items():
                for kind in self._state[name]:
                    self._set_full_state(p, kind, tensors[f"{kind}.{name}"].to(p.device))
                self._set_weight(p, tensors[f"master.{name}"])
        self.version, self.updates = int(scalars["version"]), int(scalars["updates"])
        self._at_start = None
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(self.version)
        weights_changed(self.module)

    def _check_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        want = {
            f"{kind}.{name}": tuple(shape)
            for name, shapes in self._state.items()
            for kind, shape in shapes.items()
        }
        problems = [f"missing: {n}" for n in want if n not in tensors]
        problems += [f"not of this model: {n}" for n in tensors if n not in want]
        for name, shape in want.items():
            if name in tensors and tuple(tensors[name].shape) != shape:
                problems.append(f"{name} is {tuple(tensors[name].shape)}, the model has {shape}")
        if problems:
            more = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
            raise ValueError(
                "the saved training state does not fit this model; were the model, the LoRA rank or its "
                "target_modules, trainer.optimizer, momentum, freeze or ema_decay changed?"
                + "".join(f"\n  {line}" for line in problems[:12] + more)
                + "\n"
                "Restore the settings of the run that saved it, or start a run under another run.name"
            )

    def _state_layout(self) -> dict[str, dict[str, torch.Size]]:
        """For each trained parameter the full shape of each part of its state, "master" first."""
        group_of = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        layout = {}
        for name, p in self._trained.items():
            average = {} if self._config.ema_decay is None else {_AVERAGE: p.shape}
            layout[name] = {"master": p.shape, **state_shapes(group_of[id(p)], p.shape), **average}
        return layout

    def _masters(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """The fp32 tensors that the optimiser steps, each with its parameter group."""
        groups = self._optimizer.param_groups
        if self._stage == 3:  # flat, taken in and out of the optimiser's groups during a step
            zero = self._engine.optimizer
            of_part = (
                groups[zero.sub_group_to_group_id[i]] for i in range(len(zero.fp32_partitioned_groups_flat))
            )
            return list(zip(of_part, zero.fp32_partitioned_groups_flat, strict=True))
        return [(group, master) for group in groups for master in group["params"]]

    def _create_state(self) -> None:
        """Give the optimiser its state before the first step, as it would itself: it can be saved and loaded
        then."""
        for group, master in self._masters():
            self._optimizer.state[master] = initial_state(group, master.detach())
            if self._config.ema_decay is not None:
                self._optimizer.state[master][_AVERAGE] = master.detach().clone()
        if self._stage in (1, 2):
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            for parameters, (_, flat) in zip(self._groups, self._masters(), strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self._optimizer.state)

    def _full_state(self, p: torch.nn.Parameter, kind: str) -> torch.Tensor:
        if self._stage == 0:
            return p if kind == "master" else self._optimizer.state[p][kind]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind != "master":
            return safe_get_full_optimizer_state(p, kind)
        full = safe_get_full_fp32_param(p)
        # Stages 1 and 2 put the parts together by adding zeros, which makes 0.0 of -0.0; the weight still
        # knows.
        return full if self._stage == 3 else torch.where(full == 0, p.detach().float(), full)

    def _set_full_state(self, p: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        if self._stage == 0:
            (p.data if kind == "master" else self._optimizer.state[p][kind]).copy_(value)
        elif self._stage == 3:
            self._set_partition(p, kind, value)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if kind == "master":
                safe_set_full_fp32_param(p, value)
            else:
                safe_set_full_optimizer_state(p, value, kind)

    def _set_partition(self, p: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        """ZeRO-3 pads each parameter to equal parts; its setter of whole values trips over the padding."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = p.ds_tensor.numel()
        part = torch.zeros(size, dtype=torch.float32, device=value.device)
        mine = value.flatten()[self._info.rank * size : (self._info.rank + 1) * size]
        part[: mine.numel()] = mine
        if kind == "master":
            safe_set_local_fp32_param(p, part)
        else:
            safe_set_local_optimizer_state(p, part, kind)

    def destroy(self) -> None:
        """Give back everything but the model. Its weights stay as they are, except that under ZeRO-3 they
        stay split: such a model is of no further use, and what it still holds goes with it."""
        engine, module = self._engine, self.module
        engine.destroy()
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            hook.remove()
        if self._stage == 3:
            _forget(module)
        if self._noise is not None:
            self._noise.remove()
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        engine.optimizer = engine.basic_optimizer = engine.module = None
        for p in module.parameters():
            p.grad = None
        del self._engine, self._optimizer, self._trained, self._groups
        gc.collect()


def _steps_until_all_move(trained: Mapping[str, torch.Tensor]) -> int:
    """1, and one more for each factor of 0 that the gradients of others pass: the B of adapters, a scoring head that
    starts at 0."""
    adapters = any("lora_A" in name for name in trained)
    zero_head = any("score" in name.split(".") and not p.detach().any() for name, p in trained.items())
    return 1 + adapters + zero_head


def stand_in(empty: Batch) -> Batch:
    """A pair of rows of two tokens in which nothing counts, with the fields that `empty` has."""
    return empty.zeros(rows=2, width=2)


def _sign(name: str) -> int:
    """+1 for a maximum, -1 for a minimum, 0 for a sum."""
    return 1 if name.endswith("_max") else -1 if name.endswith("_min") else 0


def _collect(collected: Sums, sums: Sums) -> None:
    """Add one micro-batch's numbers to the others'."""
    for name, value in sums.items():
        if name not in collected:
            collected[name] = value
        elif _sign(name):
            collected[name] = (torch.maximum if _sign(name) > 0 else torch.minimum)(collected[name], value)
        else:
            collected[name] = collected[name] + value


def _fingerprint(x: torch.Tensor) -> int:
    """A number that changes with any bit of an fp32 tensor, but for a chance of about 2^-64."""
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in x.reshape(-1).view(torch.int32).split(1 << 20):
        odd = 2 * torch.arange(part.numel(), device=x.device) + 1
        total = total * 0x5851F42D4C957F2D + (part.long() * odd).sum()
    return int(total)


def _forget(module: torch.nn.Module) -> None:
    """Take the model off the list on which ZeRO-3 keeps every model that the process has ever had."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK[:] = [m for m in FWD_MODULE_STACK if m is not module]


def _is_peft(model: torch.nn.Module) -> bool:
    peft = sys.modules.get("peft")  # slow to import, and a model wrapped by it cannot exist without it
    return peft is not None and isinstance(model, peft.PeftModel)
