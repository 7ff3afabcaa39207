"""RMSNorm with fewer passes over memory than transformers' modules take, and the same bits.

Here: the variant of Llama and most models after it (normalise in fp32, round, multiply by the weight), with a
backward of its own. A row depends on itself only. Not here: which modules are replaced (`rlhf.models.linear`).
The same torch operations serve CPU and CUDA.
"""

from __future__ import annotations

from typing import Any

import torch

from rlhf.kernels.threads import serial


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis: x (..., H), weight (H,) -> (..., H),
    differentiable in both. The mean is taken in fp32 (fp64 for fp64). Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps)
    return _forward(x, weight, eps)[0]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and 1 / sqrt(mean(x^2) + eps) of each row."""
    with serial(x.numel()):
        wide = _wide(x)
        total = wide.square().sum(-1, keepdim=True)
        scale = total.div_(wide.shape[-1]).add_(eps).rsqrt_()
        normal = (wide * scale).to(x.dtype)
        return (normal.mul_(weight) if weight.dtype == x.dtype else normal * weight), scale


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, scale = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # n = x s;  dw = sum g n;  dx = s (g w - n mean(g w n))
        x, weight, scale = ctx.saved_tensors
        normal, wide = _wide(x) * scale, _wide(grad)
        grad_x = grad_weight = None
        per_weight = wide * normal
        if ctx.needs_input_grad[1]:
            grad_weight = per_weight.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            mean = per_weight.mul_(weight).mean(-1, keepdim=True)
            grad_x = (wide * weight).sub_(normal.mul_(mean)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None
