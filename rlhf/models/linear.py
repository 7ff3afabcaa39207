"""Row-invariant modules inside a Hugging Face model.

Here: swapping the class of every `nn.Linear`, and of the activations between them (names, parameters, state
dict, tied embeddings and peft do not notice), and dropping the packed copies when weights change. Not here:
the kernels (`rlhf.kernels.linear`, `rlhf.kernels.activation`). On CUDA a swapped linear is `F.linear`:
nothing is packed and nothing is promised about rows.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from rlhf.kernels.activation import gelu_tanh, silu
from rlhf.kernels.linear import PackedWeight, can_pack, linear, pack


class InvariantLinear(nn.Linear):
    """`nn.Linear` whose rows do not depend on the number of rows. Made by `prepare_linears`, never
    directly.
    """

    _packed: PackedWeight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if not can_pack(weight) or x.dtype != weight.dtype:
            return linear(x, weight, self.bias)
        if "ds_id" in weight.__dict__:  # ZeRO-3: the weight is whole during this forward only
            return linear(x, weight, self.bias, pack(weight))
        return linear(x, weight, self.bias, self._packed.update(weight))


class InvariantSilu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu(x)


class InvariantGeluTanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x)


_ACTIVATIONS = {nn.SiLU: InvariantSilu, SiLUActivation: InvariantSilu, GELUTanh: InvariantGeluTanh}


def prepare_linears(model: nn.Module) -> int:
    """Make every plain `nn.Linear` of the model, and the activations between them, row-invariant; returns the
    number of linears. Call it after adapters are added: subclasses of `nn.Linear` have a forward of their own
    and stay as they are.
    """
    count = 0
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = InvariantLinear
            module._packed = PackedWeight()
        elif type(module) in _ACTIVATIONS:
            module.__class__ = _ACTIVATIONS[type(module)]
        count += isinstance(module, InvariantLinear)
    return count


def weights_changed(model: nn.Module) -> None:
    """Drop every packed copy. Call it after an optimiser step, a load or any other write to the weights:
    writes through `.data` cannot be seen from here."""
    for module in model.modules():
        if isinstance(module, InvariantLinear):
            module._packed.clear()
