"""y = x W^T + b whose rows do not depend on how many rows there are.

Here: the forward through oneDNN's prepacked weights on the CPU (bitwise the same row at every number of rows,
in fp32 and bf16) with ordinary matrix products behind it in the backward. Not here: when a weight has changed
and must be packed again (`rlhf.models.linear`). On CUDA, and for other dtypes, `linear` is
`torch.nn.functional.linear`, which promises nothing about rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rlhf.kernels.first_order import first_order

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
_WORTH_PACKING = 256  # rows, from which on a weight is packed for one product
_ROW_STEPS = ((16, 4), (32, 8), (512, 16), (1024, 128))
_has_kernel = torch.backends.mkldnn.is_available()
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default if _has_kernel else None  # looked up once


class PackedWeight:
    """One weight in oneDNN's own layout, and which state of which tensor it was made from.

    A copy (deepcopy, pickle) is empty: packs are made again where they are needed.
    """

    __slots__ = ("data", "source")

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None
        self.source: tuple[int, int, torch.dtype] | None = None

    def update(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The pack of `weight` as it is now, None where `can_pack` says no. Writes through `.data` leave no
        trace: after those, call `clear`.
        """
        source = (weight.data_ptr(), weight._version, weight.dtype)
        if source != self.source:
            self.data, self.source = pack(weight), source
        return self.data

    def clear(self) -> None:
        self.data = self.source = None

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return PackedWeight, ()


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `linear` has a row-invariant kernel for this (out, in) weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _PACKED_DTYPES
        and weight.dim() == 2
        and weight.numel() > 0
        and _has_kernel
    )


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """(out, in) fp32 or bf16 CPU weight -> an opaque tensor in oneDNN's layout, of the same size; None where
    there is no kernel for it.
    """
    if not can_pack(weight):
        return None
    with torch.inference_mode(False), torch.no_grad():  # the trainer uses the pack that the engine made
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def row_bucket(num_rows: int) -> int:
    """The number of rows that the kernel is run with: oneDNN builds a kernel for each new number of rows
    (about 1 ms), so numbers are rounded up to a few. A caller that pads its rows to a bucket saves a copy of
    x in every linear."""
    if num_rows <= 2:
        return max(num_rows, 1)
    for limit, step in _ROW_STEPS:
        if num_rows <= limit:
            return -(-num_rows // step) * step
    return -(-num_rows // 256) * 256


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out), differentiable in all three.

    `packed` is `pack(weight)`; without it this is `F.linear`.
    """
    if packed is None:
        return F.linear(x, weight, bias)
    needs_grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        return _PackedLinear.apply(x, weight, bias, packed)
    return packed_linear(x, packed, bias)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` with the pack alone, without gradient. A column does not depend on the columns beside it, so a
    pack of concatenated weights gives each weight's own bits."""
    shape = x.shape
    rows = x.reshape(-1, shape[-1])
    num_rows = rows.shape[0]
    extra = row_bucket(num_rows) - num_rows
    if extra:
        rows = F.pad(rows, (0, 0, 0, extra))
    out = _linear_pointwise(rows, packed, bias, "none", [], "")
    # not a view, which autograd would not let a model write into
    return out.resize_(*shape[:-1], out.shape[-1]) if extra or len(shape) != 2 else out


def times_weight(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows (M, out), weight (out, in) -> rows weight (M, in), for backwards: no gradient, no promise about rows. In
    fp32 oneDNN's kernel takes up to a third less time than torch's product, packing included."""
    if weight.dtype == torch.float32 and rows.shape[0] >= _WORTH_PACKING and can_pack(weight):
        return packed_linear(rows, pack(weight.t()))
    return rows @ weight


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return packed_linear(x, packed, bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = times_weight(rows, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None
