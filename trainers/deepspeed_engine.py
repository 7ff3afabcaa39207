"""A model under DeepSpeed: one optimiser step at a time, the full weights, and the whole state as plain
tensors.

Here: the process group, DeepSpeed's configuration, the step, the learning rate, and reading and writing the
state. Not here: losses (a function that is passed in), batches, checkpoints' files (`rlhf.checkpoint`), and
who calls.

What DeepSpeed is not given to decide: the learning rate is a function of the update's number, losses arrive
already divided by the step's global count, and the state leaves as full fp32 tensors by parameter name,
whatever the ZeRO stage and the number of processes. A step whose loss or gradient is not finite on any
process moves nothing on any of them.
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

Sums = dict[str, torch.Tensor]
LossFn = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, Sums]]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_GATHER_ELEMENTS = 1 << 27  # parameters gathered at once under ZeRO-3
_CPU_BUCKET_ELEMENTS = 1 << 24
_GPU_BUCKET_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class UpdateStats:
    """One optimiser step, the same on every process."""

    loss: float  # the step's loss over all micro-batches and processes
    grad_norm: float  # global 2-norm before clipping; not finite where the step was skipped
    lr: float  # learning rate of this step
    skipped: bool  # a loss or gradient was not finite: nothing has moved
    sums: Sums  # 0-dim float64 on the CPU: the loss function's numbers over the whole step


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
        dist.init_process_group(backend, store=dist.HashStore(), **place)
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


# -- learning rate -------------------------------------------------------------------------------------------


def lr_at(update: int, config: TrainerConfig, total_updates: int) -> float:
    """Learning rate of update number `update` = 0 .. total_updates - 1.

    Rises linearly over `warmup_steps` updates and reaches the peak with the last of them (with none: at
    update 0); from there linear and cosine reach min_lr_ratio times the peak with the last update.
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    peak_at = max(config.warmup_steps - 1, 0)
    done = min((update - peak_at) / max(total_updates - 1 - peak_at, 1), 1.0)
    share = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


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


def make_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW over the given parameters. Weight decay leaves out vectors: biases and norms."""
    groups = [{"params": list(parameters.values()), "weight_decay": 0.0}]
    if config.weight_decay > 0:
        matrices = [p for p in parameters.values() if p.dim() >= 2]
        vectors = [p for p in parameters.values() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


# -- the engine ----------------------------------------------------------------------------------------------


class TrainingEngine:
    """A model, its optimiser and their state, under DeepSpeed ZeRO 0 to 3 over the processes of one group.

    `model` is an ordinary Hugging Face model (peft's wrapper included) whose weights are all here and the
    same on every process; it is changed in place and belongs to the engine until `destroy`. Parameters that
    need no gradient stay out of the optimiser and its state. `dtype` is that of forward and backward; masters
    and moments are fp32.

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
    ) -> None:
        self._config, self._total, self._info = config, total_updates, info
        self._stage = effective_zero_stage(config.zero_stage, dtype)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise ValueError(
                "no parameter of the model needs a gradient; train some weights or add model.lora"
            )
        if config.offload_optimizer and self._stage == 0:
            raise ValueError("trainer.offload_optimizer needs trainer.zero_stage >= 1: ZeRO is what offloads")
        self._adam = make_optimizer(self._trained, config)
        self._groups = [list(group["params"]) for group in self._adam.param_groups]
        num_trained = sum(p.numel() for p in self._trained.values())
        self._engine = self._initialize(
            model, deepspeed_config(config, dtype=dtype, info=info, num_trained=num_trained)
        )
        self._create_moments()
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
                    model=model, optimizer=self._adam, config=config, dist_init_required=False
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

    def update(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> UpdateStats:
        """One optimiser step over this process's micro-batches, as many as every other process has.

        `loss_fn(model, micro)` returns a scalar already divided by the step's global count, so that all
        micro-batches of all processes add up to the loss, and numbers by name which add up too; names ending
        in _min or _max are reduced to the extreme instead. A micro-batch without rows takes part with a
        stand-in row that counts for nothing.

        A loss or gradient that is not finite on any process skips the step on all: no weight, moment or
        version moves, but the learning rate's position does. Raises ValueError without micro-batches.
        """
        if not micro_batches:
            raise ValueError("update() got no micro-batch; give a process without rows an empty Batch")
        lr = lr_at(self.updates, self._config, self._total)
        for group in self._adam.param_groups:
            group["lr"] = lr
        total, collected = self._accumulate(micro_batches, loss_fn)
        fault_point("optimizer.before")
        grad_norm, applied = self._step_whole() if self._stage == 0 else self._step_zero()
        self.updates += 1
        self.version += applied
        weights_changed(self.module)
        fault_point("optimizer.after")
        loss, sums = self._reduce(total, collected)
        return UpdateStats(loss=loss, grad_norm=grad_norm, lr=lr, skipped=not applied, sums=sums)

    def _accumulate(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> tuple[torch.Tensor, Sums]:
        """Backward of every micro-batch; this process's loss and numbers."""
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        collected: Sums = {}
        for i, micro in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            fault_point("train.forward")
            loss, sums = _share(self.model, micro, loss_fn)
            # DeepSpeed averages over processes; and a bad loss must not leave a finite gradient behind.
            scale = torch.where(torch.isfinite(loss.detach()), float(self._info.world_size), math.nan)
            fault_point("train.backward")
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
            _collect(collected, {name: value.detach().to(total) for name, value in sums.items()})
        return total, collected

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

    # -- full weights ----------------------------------------------------------------------------------------

    def named_full_weights(self, *, merged: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, whole, detached, in the model's dtype, tied ones once.

        With `merged`, a LoRA model is shown as the plain model that it is equivalent to: adapters added to
        the weights they adapt, names without peft's prefixes. Under ZeRO-3 the tensors are copies and every
        process must take them all; otherwise they are the live weights wherever nothing was merged.
        """
        module = self.module
        if merged and _is_peft(module):
            yield from self._merged_weights(module.get_base_model())
            return
        yield from self._plain_weights(dict(module.named_parameters()))

    def _merged_weights(self, base: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
        inside = tuple(f"{name}." for name in adapted)
        plain = {name: p for name, p in base.named_parameters() if not name.startswith(inside)}
        yield from self._plain_weights(plain)
        for name, layer in adapted.items():
            with self._gathered(list(layer.parameters())):
                own = layer.get_base_layer()
                weights = {f"{name}.{n}": self._own(p) for n, p in own.named_parameters()}
                delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
                merged = (own.weight.detach().float() + delta.detach()).to(own.weight.dtype)
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

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """(tensors, scalars): the whole training state, independent of ZeRO stage and number of processes.

        Tensors are full, fp32, on the CPU: master.<name>, exp_avg.<name>, exp_avg_sq.<name> of every trained
        parameter. They are on rank 0; the other processes get an empty dict. Scalars: version, updates.
        """
        tensors: dict[str, torch.Tensor] = {}
        for kind in ("master", *_MOMENTS):
            for name, p in self._trained.items():
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
                for kind in ("master", *_MOMENTS):
                    self._set_full_state(p, kind, tensors[f"{kind}.{name}"].to(p.device))
                with self._gathered([p], writer=0):
                    if self.weights_are_whole or self._info.rank == 0:
                        p.data.copy_(tensors[f"master.{name}"])
        self.version, self.updates = int(scalars["version"]), int(scalars["updates"])
        for state in self._adam.state.values():
            state["step"].fill_(self.version)
        weights_changed(self.module)

    def _check_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        shapes = {name: tuple(self._shape(p)) for name, p in self._trained.items()}
        want = {f"{kind}.{name}": shape for kind in ("master", *_MOMENTS) for name, shape in shapes.items()}
        problems = [f"missing: {n}" for n in want if n not in tensors]
        problems += [f"not of this model: {n}" for n in tensors if n not in want]
        for name, shape in want.items():
            if name in tensors and tuple(tensors[name].shape) != shape:
                problems.append(f"{name} is {tuple(tensors[name].shape)}, the model has {shape}")
        if problems:
            more = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
            raise ValueError(
                "the saved training state does not fit this model; were the model, the LoRA rank or its "
                "target_modules changed?" + "".join(f"\n  {line}" for line in problems[:12] + more) + "\n"
                "Restore the settings of the run that saved it, or start a run under another run.name"
            )

    def _masters(self) -> list[list[torch.Tensor]]:
        """The fp32 tensors that AdamW steps, for each parameter group."""
        if self._stage == 3:  # flat, taken in and out of the optimiser's groups during a step
            return [list(self._engine.optimizer.fp32_partitioned_groups_flat)]
        return [list(group["params"]) for group in self._adam.param_groups]

    def _create_moments(self) -> None:
        """Give AdamW its state before the first step, as it would itself: it can be saved and loaded then."""
        for master in (m for group in self._masters() for m in group):
            zeros = {key: torch.zeros_like(master, requires_grad=False) for key in _MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=master.device)
            self._adam.state[master] = {"step": step, **zeros}
        if self._stage in (1, 2):
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            for parameters, (flat,) in zip(self._groups, self._masters(), strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self._adam.state)

    def _full_state(self, p: torch.nn.Parameter, kind: str) -> torch.Tensor:
        if self._stage == 0:
            return p if kind == "master" else self._adam.state[p][kind]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind != "master":
            return safe_get_full_optimizer_state(p, kind)
        full = safe_get_full_fp32_param(p)
        # Stages 1 and 2 put the parts together by adding zeros, which makes 0.0 of -0.0; the weight still
        # knows.
        return full if self._stage == 3 else torch.where(full == 0, p.detach().float(), full)

    def _set_full_state(self, p: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        if self._stage == 0:
            (p.data if kind == "master" else self._adam.state[p][kind]).copy_(value)
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
        self._adam.state.clear()
        self._adam.param_groups.clear()
        engine.optimizer = engine.basic_optimizer = engine.module = None
        for p in module.parameters():
            p.grad = None
        del self._engine, self._adam, self._trained, self._groups
        gc.collect()


def _share(model: torch.nn.Module, micro: Batch, loss_fn: LossFn) -> tuple[torch.Tensor, Sums]:
    """This micro-batch's part of loss and numbers. Without rows both are empty, but the model has run all the
    same: the other processes wait for this one's share in every exchange that its passes make."""
    if len(micro):
        return loss_fn(model, micro)
    loss, sums = loss_fn(model, stand_in(micro))
    nothing = {n: torch.full_like(s, -_sign(n) * math.inf if _sign(n) else 0.0) for n, s in sums.items()}
    return loss * 0.0, nothing


def stand_in(empty: Batch) -> Batch:
    """One row of two tokens in which nothing counts, with the fields that `empty` has."""
    changes: dict[str, Any] = {}
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "advantages", "returns"):
        if getattr(empty, name) is not None:
            changes[name] = torch.zeros(1, 2, device=empty.token_ids.device)
    for name, dtype in (("rewards", torch.float32), ("group_ids", torch.int64)):
        if getattr(empty, name) is not None:
            changes[name] = torch.zeros(1, dtype=dtype, device=empty.token_ids.device)
    mask = torch.ones(1, 2, dtype=torch.bool, device=empty.token_ids.device)
    second = mask & torch.tensor([[False, True]], device=mask.device)
    return empty.replace(
        sample_ids=("",),
        token_ids=mask.long() * 0,
        attention_mask=mask,
        response_mask=second,
        loss_mask=mask & False,
        **changes,
    )


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


def _forget(module: torch.nn.Module) -> None:
    """Take the model off the list on which ZeRO-3 keeps every model that the process has ever had."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK[:] = [m for m in FWD_MODULE_STACK if m is not module]


def _is_peft(model: torch.nn.Module) -> bool:
    peft = sys.modules.get("peft")  # slow to import, and a model wrapped by it cannot exist without it
    return peft is not None and isinstance(model, peft.PeftModel)
