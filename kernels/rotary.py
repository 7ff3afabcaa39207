"""Rotary position embedding of halves, one pass over memory.

Here: `rotate`, differentiable, in rotary.cpp on a CPU with a C++ compiler, in rotary_triton.py on CUDA and in torch
operations elsewhere. Arithmetic is
in fp32 (fp64 for fp64) and rounded once. Not here: cos and sin, which are the model's; which models use it
(`rlhf.models.swap`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhf.kernels import gpu, native
from rlhf.kernels.first_order import first_order
from rlhf.kernels.form import NATIVE, TORCH, TRITON, took
from rlhf.kernels.layout import compute_dtype, heads_together
from rlhf.kernels.threads import serial, worth


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (N, heads, D), of which each half-pair (a, b) = (x[i], x[i + D/2]) becomes (a cos_i - b sin_i, b cos_(i + D/2) +
    a sin_(i + D/2)); cos, sin (N, D) -> (N, heads, D), differentiable in x. Su et al. 2021, arXiv 2104.09864."""
    _check(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)
    return _rotate(x, cos, sin)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate` in place, without gradient, in its bits. Raises ValueError for x whose numbers lie on one another."""
    _check(x, cos, sin)
    if x.numel() and not (x.stride(2) and (x.stride(1) or x.shape[1] == 1) and (x.stride(0) or len(x) == 1)):
        raise ValueError(
            f"x {tuple(x.shape)} with strides {x.stride()} is expanded; clone it before it is written"
        )
    fast = _fast(x, cos, sin)
    if fast is None:
        return x.copy_(_torch(x, cos, sin))
    together = heads_together(x)
    fast(together, cos, sin, out=together)
    return x if together is x else x.copy_(together)


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if x.dim() != 3 or not cos.shape == sin.shape == (x.shape[0], x.shape[2]) or x.shape[2] % 2:
        shapes = f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise ValueError(f"{shapes}: x must be (N, heads, D) with an even D, cos and sin (N, D)")
    if not x.device == cos.device == sin.device:
        raise ValueError(f"x on {x.device}, cos on {cos.device}, sin on {sin.device} must be on one device")


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, transposed: bool = False
) -> torch.Tensor:
    fast = _fast(x, cos, sin)
    if fast is None:
        return _torch(x, cos, sin, transposed=transposed)
    x = heads_together(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return fast(x, cos, sin, out=out, transposed=transposed)


def _fast(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """The form in one pass that takes the tensors, if any."""
    if native.serves("rotary", x.shape[-1], x, cos, sin):
        return _native
    return _triton if gpu.serves(x, cos, sin) else None


def _triton(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor, transposed: bool = False
) -> torch.Tensor:
    took("rotary", TRITON)
    from rlhf.kernels import rotary_triton

    return rotary_triton.rotary(x, cos.contiguous(), sin.contiguous(), out=out, transposed=transposed)


def _native(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor, transposed: bool = False
) -> torch.Tensor:
    took("rotary", NATIVE)
    tokens, heads, dim = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    run = native.function("rotary", "rotary")
    run(
        *(t.data_ptr() for t in (x, cos, sin, out)),
        tokens,
        heads,
        dim,
        x.stride(0),
        out.stride(0),
        transposed,
        x.dtype == torch.bfloat16,
        worth(x.numel()),
    )
    return out


def _torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, transposed: bool = False
) -> torch.Tensor:
    took("rotary", TORCH)
    half, dtype = x.shape[-1] // 2, compute_dtype(x.dtype)
    with serial(x.numel()):
        x_wide, cos, sin = x.to(dtype), cos[:, None].to(dtype), sin[:, None].to(dtype)
        out = x_wide * cos
        if transposed:
            crossed = x_wide * sin
            out[..., :half] += crossed[..., half:]
            out[..., half:] -= crossed[..., :half]
        else:
            crossed = x_wide * torch.cat([sin[..., half:], sin[..., :half]], -1)
            out[..., :half] -= crossed[..., half:]
            out[..., half:] += crossed[..., :half]
        return out.to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _rotate(grad, *ctx.saved_tensors, transposed=True), None, None
