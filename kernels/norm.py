"""RMSNorm with fewer passes over memory than transformers' modules take.

Here: the variant of Llama and most models after it (normalise in fp32, round, multiply by the weight), with a
backward of its own. A row depends on itself only. On a CPU with a C++ compiler norm.cpp runs, on CUDA norm_triton.py;
else the torch operations, which give the stock module's bits (the other forms add the squares up in another order). Not
here: which modules are replaced (`rlhf.models.swap`).
"""

from __future__ import annotations

from typing import Any

import torch

from rlhf.kernels import gpu, native
from rlhf.kernels.first_order import first_order
from rlhf.kernels.form import NATIVE, TORCH, TRITON, took
from rlhf.kernels.layout import heads_together, wide
from rlhf.kernels.threads import serial, worth


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis: x (..., H), weight (H,) -> (..., H),
    differentiable in both. The mean is taken in fp32 (fp64 for fp64). Zhang & Sennrich 2019, arXiv 1910.07467.
    Without gradient x may be (N, heads, H) with heads beside others in memory and weight (heads, H).
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    _check_kinds(x=x, weight=weight)
    if weight.shape != x.shape[-1:] and (needs_grad or x.dim() != 3 or weight.shape != x.shape[1:]):
        raise ValueError(
            f"weight {tuple(weight.shape)} for x {tuple(x.shape)}; it must be {tuple(x.shape[-1:])}, or without gradient and "
            "of x (N, heads, H) (heads, H)"
        )
    _check_width(x)
    return _RmsNorm.apply(x, weight, eps) if needs_grad else _forward(x, weight, eps)


def add_rms_norm(x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (N, H) += change (N, H), and `rms_norm` of the sum, in its bits. No gradient."""
    if x.shape != change.shape or weight.shape != x.shape[-1:]:
        shapes = f"x {tuple(x.shape)}, change {tuple(change.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: x and change must be alike, and weight one row of them")
    _check_kinds(x=x, change=change, weight=weight)
    _check_width(x)
    if _is_native(x, weight) and change.dtype == x.dtype and x.is_contiguous():
        return _native(x, weight, eps, change=change.contiguous())
    if gpu.serves(x, weight, change) and x.is_contiguous() and gpu.aligned(x) is x:
        return _triton(x, weight, eps, change=change.contiguous())
    with serial(x.numel()):
        x += change
    return _forward(x, weight, eps)


def _check_kinds(**tensors: torch.Tensor) -> None:
    """Dtypes of floats may differ: torch's rule of promotion says what comes of them."""
    if len({x.device for x in tensors.values()}) > 1 or not all(
        x.is_floating_point() for x in tensors.values()
    ):
        about = ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"{about}: they must be floats on one device")


def _check_width(x: torch.Tensor) -> None:
    shape = x.shape
    if not (shape and shape[-1]):
        raise ValueError(f"x {tuple(shape)} must be (..., H) with an H of at least 1, to take a mean of")


def stock_form(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in torch operations, with the stock module's bits; no gradient."""
    return _torch(x, weight, eps)[0]


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if _is_native(x, weight):
        return _native(x, weight, eps)
    if gpu.serves(x, weight):
        return _triton(x, weight, eps)
    took("norm", TORCH)
    return stock_form(x, weight, eps)


# -- the Triton form -----------------------------------------------------------------------------------------------------


def _triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, change: torch.Tensor | None = None
) -> torch.Tensor:
    took("norm", TRITON)
    from rlhf.kernels import norm_triton

    x = heads_together(x) if x.dim() == 3 else x.contiguous()
    return norm_triton.rms_norm(x, weight.contiguous(), eps, change)


def _triton_gradients(
    x: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor, needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    from rlhf.kernels import norm_triton

    return norm_triton.gradients(x.contiguous(), weight.contiguous(), eps, grad.contiguous(), needs)


# -- the native form ---------------------------------------------------------------------------------------------


def _is_native(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return native.serves("norm", x.shape[-1], x, weight)


def _native(
    x: torch.Tensor, weight: torch.Tensor, eps: float, change: torch.Tensor | None = None
) -> torch.Tensor:
    took("norm", NATIVE)
    width = x.shape[-1]
    x = heads_together(x) if x.dim() == 3 else x.contiguous()
    weight = weight.contiguous()  # a name keeps it alive during the call
    by_token = x.dim() == 3 and (weight.dim() == 2 or not x.is_contiguous())
    tokens, heads = x.shape[:2] if by_token else (x.numel() // width, 1)  # threads share out tokens
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    run = native.function("norm", "rms_norm_forward")
    run(
        x.data_ptr(),
        weight.data_ptr(),
        native.address(change),
        out.data_ptr(),
        tokens,
        heads,
        width,
        x.stride(0) if by_token else width,
        width if weight.dim() == 2 else 0,
        eps,
        x.dtype == torch.bfloat16,
        worth(x.numel()),
    )
    return out


def _native_gradients(
    x: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor, needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    width = x.shape[-1]
    x, grad, weight = x.contiguous(), grad.contiguous(), weight.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device="cpu") if needs[0] else None
    dw = torch.zeros(width, dtype=torch.float32, device="cpu") if needs[1] else None
    run = native.function("norm", "rms_norm_backward")
    run(
        *map(native.address, (x, weight, grad, dx, dw)),
        x.numel() // width,
        width,
        eps,
        x.dtype == torch.bfloat16,
        worth(x.numel()),
    )
    return dx, None if dw is None else dw.to(weight.dtype)


# -- the torch form ----------------------------------------------------------------------------------------------


def _torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and 1 / sqrt(mean(x^2) + eps) of each row."""
    with serial(x.numel()):
        x_wide = wide(x)
        total = x_wide.square().sum(-1, keepdim=True)
        scale = total.div_(x_wide.shape[-1]).add_(eps).rsqrt_()
        normal = (x_wide * scale).to(x.dtype)
        return (normal.mul_(weight) if weight.dtype == x.dtype else normal * weight), scale


def _torch_gradients(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor, needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    # n = x s;  dw = sum g n;  dx = s (g w - n mean(g w n))
    normal, grad = wide(x) * scale, wide(grad)
    grad_x = grad_weight = None
    per_weight = grad * normal
    if needs[1]:
        grad_weight = per_weight.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    if needs[0]:
        mean = per_weight.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad * weight).sub_(normal.mul_(mean)).mul_(scale).to(x.dtype)
    return grad_x, grad_weight


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.eps = eps
        if _is_native(x, weight) or gpu.serves(x, weight):
            ctx.save_for_backward(x, weight)
            return _forward(x, weight, eps)
        took("norm", TORCH)
        out, scale = _torch(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, *scale = ctx.saved_tensors
        if scale:
            return *_torch_gradients(x, weight, *scale, grad, ctx.needs_input_grad), None
        gradients = _native_gradients if _is_native(x, weight) else _triton_gradients
        return *gradients(x, weight, ctx.eps, grad, ctx.needs_input_grad), None
