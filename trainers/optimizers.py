"""What is trained, by which optimiser, at which rate.

Here: freezing parameters by name, torch's optimisers by name with their parameter groups, what state each keeps for a
parameter, and the learning rate as a function of the update's number. Not here: taking a step, nor splitting and
saving the state (`rlhf.trainers.deepspeed_engine`).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from rlhf.recipe.schema import TrainerConfig

_IN_LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # the first number in a parameter's name is that of its layer
_OF_PEFT = "base_model.model."

# -- freezing ------------------------------------------------------------------------------------------------


def freeze(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Parameters whose name fits one of the patterns (with *, as in `model.layers.0.*`) need no gradient any more.

    Names are those of the plain model, without peft's prefix; tied parameters have all their names. Raises ValueError
    for a pattern that fits no name, and if nothing would be left to train.
    """
    named = [(n.removeprefix(_OF_PEFT), p) for n, p in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        fitting = [p for name, p in named if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(
                f"trainer.freeze: no parameter is named {pattern!r}{_meant(pattern, [name for name, _ in named])}"
            )
        for p in fitting:
            p.requires_grad_(False)
    if patterns and not any(p.requires_grad for _, p in named):
        raise ValueError(f"trainer.freeze: {', '.join(patterns)} leave no parameter to train; freeze less")


def _meant(pattern: str, names: Sequence[str]) -> str:
    """; did you mean ...: the parameters of a module that was named without them, or the closest name."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; did you mean {pattern + '.*'!r}?"
    modules = {name[:i] + ".*" for name in names for i, letter in enumerate(name) if letter == "."}
    close = difflib.get_close_matches(pattern, [*names, *sorted(modules)], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; the first is {names[0]!r}"


# -- optimisers ----------------------------------------------------------------------------------------------

WHOLE_MATRICES = ("adafactor", "muon")  # read rows and columns, which ZeRO 1 to 3 flatten
_WITHOUT_STEP = ("sgd", "muon")  # have no count of their steps in their state


class Joined(torch.optim.Optimizer):
    """Several optimisers as one, over each other's parameter groups and with one state.

    For muon, which is defined for matrices only; and around adagrad, which DeepSpeed would replace with one of its
    own that forgets the parameter groups.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        for part in parts:
            part.state.clear()
            part.state = self.state

    def step(self, closure: None = None) -> None:
        for part in self._parts:
            part.step()


def make_optimizer(model: torch.nn.Module, config: TrainerConfig) -> torch.optim.Optimizer:
    """The recipe's optimiser over the parameters that need a gradient.

    Its groups hold, beside torch's own entries, `kind` (see `state_shapes`) and `lr_scale`, which the group's rate
    is `config.lr` times. Weight decay leaves out vectors: biases and norms. With `layer_lr_decay` d, layer i of L has
    lr_scale d^(L-1-i), what comes before the layers (embeddings, tied heads) d^L, what comes after them 1.

    adamw (1711.05101), adam (1412.6980), sgd, adagrad, rmsprop (its smoothing is the second of `betas`), adafactor (1804.04235;
    `lr` is relative to a parameter's own size, at least 1e-3), muon (2502.16982: matrices inside the layers, scaled so
    that `lr` and `weight_decay` mean what they mean to adamw, which takes everything else).

    Raises ValueError for `layer_lr_decay` of a model without numbered layers.
    """
    groups: dict[tuple[str, bool, float], dict[str, Any]] = {}
    scales = _lr_scales(model, config.layer_lr_decay)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = config.optimizer
        if kind == "muon" and not (p.dim() == 2 and _IN_LAYER.search(name)):
            kind = "adamw"
        is_matrix = p.dim() >= 2  # by themselves without decay too: `lay_together` relies on their order
        group = groups.setdefault(
            (kind, is_matrix, scales[name]),
            {
                "params": [],
                "weight_decay": config.weight_decay if is_matrix else 0.0,
                "lr": config.lr * scales[name],
                "lr_scale": scales[name],
                "kind": kind,
            },
        )
        group["params"].append(p)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: not key[1])]  # matrices first
    kinds = dict.fromkeys(group["kind"] for group in ordered)
    parts = [_MAKE[kind]([g for g in ordered if g["kind"] == kind], config) for kind in kinds]
    return Joined(parts) if config.optimizer in ("muon", "adagrad") else parts[0]


_MAKE: dict[str, Callable[[list[dict[str, Any]], TrainerConfig], torch.optim.Optimizer]] = {
    "adamw": lambda groups, c: torch.optim.AdamW(groups, betas=c.betas, eps=c.eps, fused=True),
    "adam": lambda groups, c: torch.optim.Adam(groups, betas=c.betas, eps=c.eps, fused=True),
    "sgd": lambda groups, c: torch.optim.SGD(groups, momentum=c.momentum),
    "adagrad": lambda groups, c: torch.optim.Adagrad(groups, eps=c.eps),
    "rmsprop": lambda groups, c: torch.optim.RMSprop(
        groups, alpha=c.betas[1], eps=c.eps, momentum=c.momentum
    ),
    "adafactor": lambda groups, c: torch.optim.Adafactor(groups),
    "muon": lambda groups, c: torch.optim.Muon(groups, momentum=c.momentum, adjust_lr_fn="match_rms_adamw"),
}


def state_shapes(group: dict[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
    """The tensors that the optimiser keeps for a parameter of this shape in this group, by torch's names. All start at
    0; the count of steps is not among them (`initial_state`)."""
    kind = group["kind"]
    if kind in ("adamw", "adam"):
        return {"exp_avg": shape, "exp_avg_sq": shape}
    if kind == "adafactor":
        if len(shape) < 2:
            return {"variance": shape}
        return {
            "row_var": torch.Size((*shape[:-1], 1)),
            "col_var": torch.Size((*shape[:-2], 1, shape[-1])),
        }
    accumulator = {"adagrad": {"sum": shape}, "rmsprop": {"square_avg": shape}}.get(kind, {})
    return accumulator | ({"momentum_buffer": shape} if group.get("momentum") or kind == "muon" else {})


def initial_state(group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state that the optimiser would give to `parameter` at its first step, so that it can be saved before."""
    state = {
        name: torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        for name, shape in state_shapes(group, parameter.shape).items()
    }
    if group["kind"] in _WITHOUT_STEP:
        return state
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **state}


def _lr_scales(model: torch.nn.Module, decay: float | None) -> dict[str, float]:
    """What the rate of each parameter is multiplied with."""
    names = [name for name, _ in model.named_parameters()]
    if decay is None:
        return dict.fromkeys(names, 1.0)
    layers = _layers(names)
    if not any(layer is not None for layer in layers):
        raise ValueError(f"trainer.layer_lr_decay={decay}: the model has no numbered layers; leave it out")
    first = next(i for i, layer in enumerate(layers) if layer is not None)
    top = max(layer for layer in layers if layer is not None)
    above = [top + 1 if i < first else 0 if layer is None else top - layer for i, layer in enumerate(layers)]
    return {name: decay**n for name, n in zip(names, above, strict=True)}


def _layers(names: Iterable[str]) -> list[int | None]:
    found = [_IN_LAYER.search(name) for name in names]
    return [int(match[1]) if match else None for match in found]


# -- learning rate -------------------------------------------------------------------------------------------


def lr_at(update: int, config: TrainerConfig, total_updates: int) -> float:
    """Learning rate of update number `update` = 0 .. total_updates - 1.

    Rises linearly over `warmup_steps` updates and reaches the peak with the last of them (with none: at update 0).
    From there it is min_lr_ratio + (1 - min_lr_ratio) * share times the peak, share by `SCHEDULES`.
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    share = SCHEDULES[config.schedule](update, config, total_updates)
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


def _done(update: int, config: TrainerConfig, total: int) -> float:
    """0 at the peak, 1 at the last update and after it."""
    peak_at = max(config.warmup_steps - 1, 0)
    return min((update - peak_at) / max(total - 1 - peak_at, 1), 1.0)


def linear(update: int, config: TrainerConfig, total: int) -> float:
    """A straight line from 1 at the peak to 0 at the last update."""
    return 1.0 - _done(update, config, total)


def cosine(update: int, config: TrainerConfig, total: int) -> float:
    """Half a cosine from 1 at the peak to 0 at the last update (1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * _done(update, config, total)))


def polynomial(update: int, config: TrainerConfig, total: int) -> float:
    """The straight line of `linear` to the power `poly_power`."""
    return linear(update, config, total) ** config.poly_power


def inverse_sqrt(update: int, config: TrainerConfig, total: int) -> float:
    """sqrt(w / (update + 1)) with w = max(warmup_steps, 1), in updates counted from 1 (1706.03762, section 5.3): 1
    at the peak, and a function of the update alone, not of the total."""
    return math.sqrt(max(config.warmup_steps, 1) / (update + 1))


def wsd(update: int, config: TrainerConfig, total: int) -> float:
    """Warm-up, stable, decay (2404.06395): 1 until `decay_steps` updates before the last one (default: a tenth of all,
    at least one), then a straight line to 0 at the last."""
    decay_steps = config.decay_steps or max(total // 10, 1)
    return min(max(total - 1 - update, 0) / decay_steps, 1.0)


def cosine_restarts(update: int, config: TrainerConfig, total: int) -> float:
    """`cycles` half cosines of equal length, each from 1 to 0 (1608.03983); the last update is at 0."""
    peak_at = max(config.warmup_steps - 1, 0)
    span = max(total - 1 - peak_at, 1)
    if update - peak_at >= span:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * ((update - peak_at) * config.cycles % span) / span))


SCHEDULES: dict[str, Callable[[int, TrainerConfig, int], float]] = {
    "linear": linear,
    "cosine": cosine,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
    "cosine_restarts": cosine_restarts,
}
