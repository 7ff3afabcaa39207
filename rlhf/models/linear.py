"""Row-invariant modules inside a Hugging Face model.

Here: swapping the class of every `nn.Linear`, of the activations between them, and of norms that have a faster
kernel with the same bits (names, parameters, state dict, tied embeddings and peft do not notice), and dropping
the packed copies when weights change. Not here: the kernels (`rlhf.kernels.linear`, `.activation`, `.norm`). On
CUDA a swapped linear is `F.linear`: nothing is packed and nothing is promised about rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from rlhf.kernels.activation import gelu_tanh, silu
from rlhf.kernels.linear import PackedWeight, linear, pack
from rlhf.kernels.norm import rms_norm


class InvariantLinear(nn.Linear):
    """`nn.Linear` whose rows do not depend on the number of rows. Made by `prepare_linears`, never
    directly.
    """

    _packed: PackedWeight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed_weight()
        if packed is None or x.dtype != self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias, packed)

    def packed_weight(self) -> torch.Tensor | None:
        """The pack of the weight as it is now; None where there is no kernel for it."""
        weight = self.weight
        if "ds_id" in weight.__dict__:  # ZeRO-3: the weight is whole during this forward only
            return pack(weight)
        return self._packed.update(weight)


class InvariantSilu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu(x)


class InvariantGeluTanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x)


class FastRMSNorm(nn.Module):
    """Llama's RMSNorm. Made by `prepare_linears` from a module that computes the same."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)


ACTIVATIONS = {nn.SiLU: InvariantSilu, SiLUActivation: InvariantSilu, GELUTanh: InvariantGeluTanh}


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether a module of transformers computes what `rms_norm` does, to fp32 rounding: tried, because the name
    does not say it (Gemma's multiplies by 1 + weight)."""
    if set(norm._parameters) != {"weight"} or not isinstance(norm.__dict__.get("variance_epsilon"), float):
        return False
    generator = torch.Generator().manual_seed(0)
    size = (norm.weight.numel(),)
    weight, x = torch.randn(size, generator=generator), torch.randn((3, *size), generator=generator) * 0.01
    with torch.no_grad():
        stock = torch.func.functional_call(norm, {"weight": weight}, (x,))
    return torch.allclose(rms_norm(x, weight, norm.variance_epsilon), stock, rtol=1e-6, atol=1e-6)


def prepare_linears(model: nn.Module) -> int:
    """Make every plain `nn.Linear` of the model, and the activations between them, row-invariant, and its norms
    faster; returns the number of linears. Call it after adapters are added: subclasses of `nn.Linear` have a
    forward of their own and stay as they are.
    """
    count = 0
    same_norm: dict[type, bool] = {FastRMSNorm: False}
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = InvariantLinear
            module._packed = PackedWeight()
        elif type(module) in ACTIVATIONS:
            module.__class__ = ACTIVATIONS[type(module)]
        elif type(module).__name__.endswith("RMSNorm"):
            kind = type(module)
            if kind not in same_norm:
                same_norm[kind] = _is_rms_norm(module)
            if same_norm[kind]:
                module.__class__ = FastRMSNorm
        count += isinstance(module, InvariantLinear)
    return count


def weights_changed(model: nn.Module) -> None:
    """Drop every packed copy. Call it after an optimiser step, a load or any other write to the weights:
    writes through `.data` cannot be seen from here."""
    for module in model.modules():
        if isinstance(module, InvariantLinear):
            module._packed.clear()
