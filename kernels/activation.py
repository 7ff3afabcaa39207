"""SiLU, GELU, SwiGLU and GeGLU whose values do not depend on where in a tensor an element lies.

torch's fused CPU kernels round the last few elements of a thread's share differently from the rest, so a
row's result depends on how many rows there are. Here they are composed of operations that do not (exp, erf
and tanh through the vector mathematics library, exact arithmetic otherwise). Where the width leaves no such
remainder, and on CUDA, the fused kernels run. The backward is always the fused one. SwiGLU and GeGLU have a form in C++,
activation.cpp, and one in Triton, activation_triton.py; they keep nothing but their two inputs for the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from rlhf.kernels import gpu, native
from rlhf.kernels.first_order import first_order
from rlhf.kernels.form import NATIVE, TORCH, TRITON, took
from rlhf.kernels.layout import wide
from rlhf.kernels.threads import serial, worth

_VECTOR = 64  # elements that a fused kernel takes in one turn of its loop, at most
_SILU, _GELU_TANH, _GELU = range(3)  # as activation.cpp counts them


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)), any shape and float dtype, differentiable."""
    took("activation", TORCH)
    if _has_no_remainder(x):
        return F.silu(x)
    return _Silu.apply(x) if torch.is_grad_enabled() and x.requires_grad else _silu(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x/2 (1 + erf(x / sqrt(2))), any shape and float dtype, differentiable. Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    took("activation", TORCH)
    if not x.is_cpu:  # there torch's own rounds a tensor with gaps in another way
        return F.gelu(x)
    return _Gelu.apply(x, "none") if torch.is_grad_enabled() and x.requires_grad else _gelu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), any shape and float dtype, differentiable."""
    took("activation", TORCH)
    if _has_no_remainder(x):
        return F.gelu(x, approximate="tanh")
    return _Gelu.apply(x, "tanh") if torch.is_grad_enabled() and x.requires_grad else _gelu_tanh(x)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: both (..., I) -> (..., I), differentiable in both. Shazeer 2020, arXiv 2002.05202."""
    return _gated(gate, up, _SILU)


def geglu(gate: torch.Tensor, up: torch.Tensor, *, tanh: bool = True) -> torch.Tensor:
    """gelu_tanh(gate) * up, or with tanh=False gelu(gate) * up: both (..., I) -> (..., I), differentiable in both. Shazeer
    2020, arXiv 2002.05202."""
    return _gated(gate, up, _GELU_TANH if tanh else _GELU)


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
    shape = gate.shape
    if shape != up.shape:
        raise ValueError(f"gate {tuple(shape)} and up {tuple(up.shape)} must have the same shape")
    if not shape:
        raise ValueError("gate () and up () are single numbers; they must be (..., I)")
    needs_grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if native.serves("activation", shape[-1], gate, up):
        took("gated activation", NATIVE)
        return _Native.apply(gate, up, activation) if needs_grad else _native(gate, up, activation, shape)
    if gate.dtype != up.dtype or gate.device != up.device:
        same = tuple(shape)
        kinds = f"gate {same} {gate.dtype} on {gate.device}, up {same} {up.dtype} on {up.device}"
        raise ValueError(f"{kinds}: they must have one dtype and lie on one device")
    if gpu.serves(gate, up):
        took("gated activation", TRITON)
        return _Triton.apply(gate, up, activation)
    took("gated activation", TORCH)
    hidden = (silu, gelu_tanh, gelu)[activation](gate)
    if needs_grad:
        return hidden * up
    with serial(hidden.numel()):
        return hidden.mul_(up)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., I) as (rows, I), each row together in memory."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _native(gate: torch.Tensor, up: torch.Tensor, activation: int, shape: torch.Size) -> torch.Tensor:
    gate, up, layout = _layout(gate, up, shape[-1])
    out = gate.new_empty(*shape)
    native.function("activation", "gated_forward")(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), activation, *layout
    )
    return out


def _layout(
    gate: torch.Tensor, up: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Both with rows that activation.cpp can step through, and what it wants to know of them."""
    count, is_bf16 = gate.numel(), gate.dtype is torch.bfloat16
    threads = worth(count)
    if threads == 1 and gate.is_contiguous() and up.is_contiguous():
        return gate, up, (is_bf16, 1, 1, count, count, count)  # one row, as long as all of them
    of_gate, of_up = _row_step(gate), _row_step(up)
    if of_gate is None:
        gate, of_gate = gate.contiguous(), width
    if of_up is None:
        up, of_up = up.contiguous(), width
    return gate, up, (is_bf16, threads, count // width, width, of_gate, of_up)


def _row_step(x: torch.Tensor) -> int | None:
    """How far a row of x (..., I) lies from the one before it; None where that differs or rows are torn apart."""
    if x.is_contiguous():
        return x.shape[-1]
    *before, step, inner = x.stride() if x.dim() > 1 else (0, *x.stride())
    if inner != 1 or any(at != step * math.prod(x.shape[i + 1 : -1]) for i, at in enumerate(before)):
        return None
    return step


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _native(gate, up, activation, gate.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, layout = _layout(*ctx.saved_tensors, grad.shape[-1])
        grad = grad.contiguous()
        to_gate, to_up = (x.new_empty(x.shape) for x in (gate, up))
        given = map(native.address, (gate, up, grad, to_gate, to_up))
        native.function("activation", "gated_backward")(*given, ctx.activation, *layout)
        return to_gate, to_up, None


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
        from rlhf.kernels import activation_triton

        ctx.save_for_backward(gate, up)
        ctx.kind = {"gelu": activation != _SILU, "erf": activation == _GELU}
        return activation_triton.gated(_rows(gate), _rows(up), **ctx.kind).view(gate.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from rlhf.kernels import activation_triton

        gate, up = ctx.saved_tensors
        found = activation_triton.gradients(_rows(gate), _rows(up), grad.contiguous(), **ctx.kind)
        return *(d.view(gate.shape) for d in found), None


def _has_no_remainder(x: torch.Tensor) -> bool:
    """Whether every thread's share of any number of rows is a whole number of vectors."""
    if x.device.type != "cpu":
        return True
    return x.shape[-1] % (_VECTOR * math.lcm(*range(1, torch.get_num_threads() + 1))) == 0


def _silu(x: torch.Tensor) -> torch.Tensor:
    x_wide = wide(x)
    return x_wide.div(x_wide.neg().exp_().add_(1)).to(x.dtype)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    x_wide = wide(x)
    return x_wide.mul(math.sqrt(0.5)).erf_().add_(1).mul_(x_wide).mul_(0.5).to(x.dtype)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    x_wide = wide(x)
    inner = x_wide.mul(x_wide).mul_(x_wide).mul_(0.044715)
    inner.add_(x_wide).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1).mul_(x_wide).mul_(0.5).to(x.dtype)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _silu(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.silu_backward(grad, *ctx.saved_tensors)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, approximate: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return _gelu_tanh(x) if approximate == "tanh" else _gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ops.aten.gelu_backward(grad, *ctx.saved_tensors, approximate=ctx.approximate), None
