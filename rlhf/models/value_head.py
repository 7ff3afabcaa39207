"""A causal language model that also gives values: actor and critic on one trunk.

The value head is one number for each token, made from the same hidden state as the logits, so that one pass through the
trunk gives both. It is a child of the model under the name `value_head`, trained whole beside LoRA too; its values are
made where `ask_values` asks for them. Exported it lies beside the plain model, in a file that transformers does not read.
Not here: which tokens' values are wanted (`rlhf.values`).

One forward runs at a time in a process; the list that is asked for is a module variable, not a thread-local.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.models.scalar import ScoreHead

NAME = "value_head"
FILE = "value_head.safetensors"


def add_value_head(model: nn.Module, folder: str | None) -> None:
    """Give a model of `load_model` a value head, in place: the one that `folder` holds beside its weights, else one that
    starts at 0.

    Raises ValueError for a head of another size, and for one that is not finite.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    size = base.get_output_embeddings().in_features
    head = nn.Linear(size, 1, bias=False, device=base.device, dtype=base.dtype)
    stored = Path(folder).expanduser() / FILE if folder is not None else None
    nn.init.zeros_(head.weight)
    if stored is not None and stored.is_file():
        head.weight.data.copy_(_read(stored, size))
    head.__class__ = ScoreHead
    base.add_module(NAME, head)
    base.__class__ = _with_values(type(base))


def is_of_value_head(name: str) -> bool:
    """Whether a parameter of this name belongs to a value head."""
    return name.split(".")[-2:-1] == [NAME]


def save_value_head(weights: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Write the value head among `weights`, by name, if there is one, where `add_value_head` finds it."""
    head = [w for name, w in weights.items() if is_of_value_head(name)]
    if head:
        save_file({"weight": head[0].detach().cpu().contiguous()}, Path(folder) / FILE)


def _read(file: Path, size: int) -> torch.Tensor:
    weight = load_file(file)["weight"]
    if weight.shape != (1, size):
        raise ValueError(
            f"{file} is the value head of another model: {tuple(weight.shape)} instead of {(1, size)}; remove it"
        )
    if not weight.isfinite().all():
        raise ValueError(f"{file} holds numbers that are not finite; remove it to start the value head at 0")
    return weight


@contextmanager
def ask_values() -> Iterator[list[torch.Tensor]]:
    """Within it, every forward of a model with a value head adds the values of the tokens that its head of logits sees to
    the list that this gives: (N,) fp32, or (M,) for those in `logits_to_keep`."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


_asked: list[torch.Tensor] | None = None


class _Values:
    """Mixed into a causal language model's class: values from the hidden state that the logits are made of."""

    def forward(self, *args: Any, **options: Any) -> Any:
        if _asked is None:
            return super().forward(*args, **options)
        hidden: list[torch.Tensor] = []
        reading = self.get_output_embeddings().register_forward_pre_hook(
            lambda _, given: hidden.append(given[0])
        )
        try:
            output = super().forward(*args, **options)
        finally:
            reading.remove()
        _asked.append(self.value_head(hidden[0])[0, :, 0])
        return output


@functools.cache
def _with_values(stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass under the same name, which is what `save_pretrained` writes into config.json."""
    return type(stock.__name__, (_Values, stock), {"__module__": stock.__module__})
