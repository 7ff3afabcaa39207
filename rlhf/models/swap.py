"""Our forms of a Hugging Face model's modules, put in their places: the trainer and the engine both run them.

Here: swapping the class of every `nn.Linear` and of the activations between them for row-invariant ones, and of norms,
gated MLPs and rotations that have a form with fewer passes over memory. Names, parameters, state dict, tied embeddings
and peft do not notice. What a name promises is not believed: a class is swapped where it was tried and computed the same;
every other stays as it is. Not here: the arithmetic (`rlhf.kernels`), attention (`rlhf.models.attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from rlhf.kernels.activation import geglu, gelu, gelu_tanh, silu, swiglu
from rlhf.kernels.linear import PackedWeight
from rlhf.kernels.norm import rms_norm, stock_form
from rlhf.kernels.rotary import rotate
from rlhf.models.linear import InvariantLinear

_ROTATION = "apply_rotary_pos_emb"  # transformers' name, in each model's file
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class InvariantSilu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu(x)


class InvariantGeluTanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x)


class InvariantGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(x)


class FastRMSNorm(nn.Module):
    """Llama's RMSNorm. Made by `swap_modules` from a module that computes the same."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)


class GatedMLP(nn.Module):
    """Llama's MLP with SiLU. Made by `swap_modules` from a module that computes the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GatedGeluTanhMLP(nn.Module):
    """Gemma's MLP, with tanh-GELU. Made by `swap_modules` from a module that computes the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class GatedGeluMLP(nn.Module):
    """The same with the exact GELU. Made by `swap_modules` from a module that computes the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x), tanh=False))


ACTIVATIONS = {
    nn.SiLU: InvariantSilu,
    SiLUActivation: InvariantSilu,
    GELUTanh: InvariantGeluTanh,
    GELUActivation: InvariantGelu,
}
_GATED_BY = {InvariantSilu: GatedMLP, InvariantGeluTanh: GatedGeluTanhMLP, InvariantGelu: GatedGeluMLP}


def swap_modules(model: nn.Module) -> int:
    """Put our forms in their places; returns the number of linears. Call it after adapters are added: subclasses of
    `nn.Linear` have a forward of their own and stay as they are."""
    count = 0
    tried: dict[tuple[type, type], type] = {}
    for module in list(model.modules()):
        kind, inner = type(module), type(module._modules.get("act_fn"))
        if (kind, inner) not in tried:
            tried[kind, inner] = _ours(module)
        module.__class__ = tried[kind, inner]
        if kind is nn.Linear:
            module._packed = PackedWeight()
        count += isinstance(module, InvariantLinear)
    return count


def _ours(module: nn.Module) -> type:
    """The class to swap a module's for, its own where there is none."""
    kind = type(module)
    if kind.__module__ == __name__:
        return kind
    if kind is nn.Linear:
        return InvariantLinear
    if kind in ACTIVATIONS:
        return ACTIVATIONS[kind]
    if kind.__name__.endswith("RMSNorm") and _is_rms_norm(module):
        return FastRMSNorm
    if (gated := _gated_mlp(module)) is not None:
        return gated
    return _with_our_rotation(kind)


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether a module computes what `rms_norm` does: to rounding in fp32 (Gemma's multiplies by 1 + weight), and with
    the same roundings in bf16 (OLMo's multiplies before it rounds)."""
    if set(norm._parameters) != {"weight"} or not isinstance(norm.__dict__.get("variance_epsilon"), float):
        return False
    generator = torch.Generator().manual_seed(0)
    size, eps = (norm.weight.numel(),), norm.variance_epsilon
    if not size[0]:  # a partition of it is elsewhere
        return False
    weight, x = torch.randn(size, generator=generator), torch.randn((3, *size), generator=generator) * 0.01

    def stock(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    with torch.no_grad():
        if not _same(rms_norm(x, weight, eps), stock(weight, x)):
            return False
        x = x.bfloat16()
        weights = (weight.bfloat16(), weight)
        pairs = [(stock_form(x, w, eps), stock(w, x)) for w in weights]
    return all(ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in pairs)


def _gated_mlp(mlp: nn.Module) -> type | None:
    """The class of ours that has a module's forward, if any: asked of one with small linears of its own."""
    if set(mlp._modules) != _GATED or mlp._parameters:
        return None
    ours = _GATED_BY.get(ACTIVATIONS.get(type(mlp.act_fn)))
    if ours is None:
        return None
    generator = torch.Generator().manual_seed(0)
    stand_in = type(mlp).__new__(type(mlp))
    stand_in.__dict__.update({k: v for k, v in mlp.__dict__.items() if k != "_modules"}, _modules={})
    for name, (inputs, outputs) in {"gate_proj": (4, 8), "up_proj": (4, 8), "down_proj": (8, 4)}.items():
        linear = nn.Linear(inputs, outputs, bias=False, device="cpu", dtype=torch.float32)
        linear.weight.data = torch.randn((outputs, inputs), generator=generator)
        stand_in._modules[name] = linear
    stand_in._modules["act_fn"] = mlp.act_fn
    x = torch.randn((3, 4), generator=generator)
    try:
        with torch.no_grad():
            return ours if _same(ours.forward(stand_in, x), stand_in.forward(x)) else None
    except (AttributeError, TypeError, RuntimeError):  # it wants more than a gated MLP has
        return None


@functools.cache
def _with_our_rotation(kind: type) -> type:
    """The class with a forward that calls `rotate` where it called its file's rotation; itself where it calls none, or one
    that computes something else."""
    forward = kind.__dict__.get("forward")
    if not isinstance(forward, FunctionType) or _ROTATION not in forward.__code__.co_names:
        return kind
    stock = forward.__globals__.get(_ROTATION)
    if stock is None or not _is_rotation(stock):
        return kind
    names = forward.__globals__ | {_ROTATION: _rotation(stock)}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    own = {"forward": ours, "__reduce_ex__": _reduce, "__module__": __name__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), own)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """For pickle, which cannot find a class that was made here by its name."""
    return _rebuild, (type(module).__mro__[1],), module.__dict__


def _rebuild(kind: type) -> nn.Module:
    ours = _with_our_rotation(kind)
    return ours.__new__(ours)


def _rotation(stock: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def rotation(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (B, Hq, T, D), k (B, Hkv, T, D), cos and sin (B or 1, T, D) -> q and k rotated."""
        # other layouts, a part of each head, or a result in another dtype
        if rest or named or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
            return stock(q, k, cos, sin, *rest, **named)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    return rotation


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    batch, heads, length, dim = x.shape
    tokens = x.transpose(1, 2).reshape(batch * length, heads, dim)
    cos, sin = (a.expand(batch, -1, -1).reshape(batch * length, dim) for a in (cos, sin))
    return rotate(tokens, cos, sin).view(batch, length, heads, dim).transpose(1, 2)


def _is_rotation(stock: Callable[..., Any]) -> bool:
    """Whether a model's rotation is that of halves, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((2, heads, 5, 16), generator=generator) for heads in (3, 1))
    cos, sin = (torch.randn((2, 5, 16), generator=generator) for _ in range(2))
    try:
        found = stock(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # it wants other arguments
        return False
    wanted = _rotation(stock)(q, k, cos, sin)
    return isinstance(found, tuple) and len(found) == 2 and all(map(_same, wanted, found))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6)
