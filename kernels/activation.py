"""SiLU, tanh-GELU, SwiGLU and GeGLU whose values do not depend on where in a tensor an element lies.

torch's fused CPU kernels round the last few elements of a thread's share differently from the rest, so a
row's result depends on how many rows there are. Here they are composed of operations that do not (exp and
tanh through the vector mathematics library, exact arithmetic otherwise). Where the width leaves no such
remainder, and on CUDA, the fused kernels run. The backward is always the fused one. SwiGLU has a form in C++,
activation.cpp, and both have one in Triton, activation_triton.py; they keep nothing but its two inputs for the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from rlhf.kernels import gpu, native
from rlhf.kernels.first_order import first_order
from rlhf.kernels.layout import wide
from rlhf.kernels.threads import serial, worth

_VECTOR = 64  # elements that a fused kernel takes in one turn of its loop, at most


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)), any shape and float dtype, differentiable."""
    if _has_no_remainder(x):
        return F.silu(x)
    return _Silu.apply(x) if torch.is_grad_enabled() and x.requires_grad else _silu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), any shape and float dtype, differentiable."""
    if _has_no_remainder(x):
        return F.gelu(x, approximate="tanh")
    return _GeluTanh.apply(x) if torch.is_grad_enabled() and x.requires_grad else _gelu_tanh(x)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: both (..., I) -> (..., I), differentiable in both. Shazeer 2020, arXiv 2002.05202."""
    _check_alike(gate, up)
    needs_grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if native.serves("activation", gate.shape[-1], gate, up):
        return _SwiGLU.apply(gate, up) if needs_grad else _swiglu_native(gate, up)
    if gpu.serves(gate, up):
        return _Gated.apply(gate, up, False)
    if needs_grad:
        return silu(gate) * up
    hidden = silu(gate)
    with serial(hidden.numel()):
        return hidden.mul_(up)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(gate) * up: both (..., I) -> (..., I), differentiable in both. Shazeer 2020, arXiv 2002.05202."""
    _check_alike(gate, up)
    return _Gated.apply(gate, up, True) if gpu.serves(gate, up) else gelu_tanh(gate) * up


def _check_alike(gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have the same shape")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., I) as (rows, I), each row together in memory."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _swiglu_native(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up, layout = _layout(gate, up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device="cpu")
    native.function("activation", "swiglu_forward", "pppiiiiii")(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), *layout
    )
    return out


def _layout(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Both with rows that activation.cpp can step through, and what it wants to know of them."""
    width, count = gate.shape[-1], gate.numel()
    of_gate, of_up = _row_step(gate), _row_step(up)
    if of_gate is None:
        gate, of_gate = gate.contiguous(), width
    if of_up is None:
        up, of_up = up.contiguous(), width
    return gate, up, (count // width, width, of_gate, of_up, gate.dtype == torch.bfloat16, worth(count))


def _row_step(x: torch.Tensor) -> int | None:
    """How far a row of x (..., I) lies from the one before it; None where that differs or rows are torn apart."""
    if x.is_contiguous():
        return x.shape[-1]
    *before, step, inner = x.stride() if x.dim() > 1 else (0, *x.stride())
    if inner != 1 or any(at != step * math.prod(x.shape[i + 1 : -1]) for i, at in enumerate(before)):
        return None
    return step


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu_native(gate, up)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up, layout = _layout(*ctx.saved_tensors)
        grad = grad.contiguous()
        to_gate, to_up = (torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in (gate, up))
        native.function("activation", "swiglu_backward", "pppppiiiiii")(
            *(x.data_ptr() for x in (gate, up, grad, to_gate, to_up)), *layout
        )
        return to_gate, to_up


class _Gated(torch.autograd.Function):
    """SwiGLU or GeGLU in Triton."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
        from rlhf.kernels import activation_triton

        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return activation_triton.gated(_rows(gate), _rows(up), gelu=gelu).view(gate.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from rlhf.kernels import activation_triton

        gate, up = ctx.saved_tensors
        found = activation_triton.gradients(_rows(gate), _rows(up), grad.contiguous(), gelu=ctx.gelu)
        return *(d.view(gate.shape) for d in found), None


def _has_no_remainder(x: torch.Tensor) -> bool:
    """Whether every thread's share of any number of rows is a whole number of vectors."""
    if x.device.type != "cpu":
        return True
    return x.shape[-1] % (_VECTOR * math.lcm(*range(1, torch.get_num_threads() + 1))) == 0


def _silu(x: torch.Tensor) -> torch.Tensor:
    x_wide = wide(x)
    return x_wide.div(x_wide.neg().exp_().add_(1)).to(x.dtype)


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


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _gelu_tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(grad, *ctx.saved_tensors, approximate="tanh")
