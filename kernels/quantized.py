"""y = x W^T + b with weights of 8 or 4 bits, of which a row depends on itself and the weights only.

Here: `quantize`, `dequantize` and `quantized_linear`. 8 bits: whole numbers from -127 to 127 and a scale for each output.
4 bits: from -8 to 7 and a scale for each group of inputs of an output; the number that is largest in magnitude becomes
-8 times its scale, whose sign it decides, or a little less where that leaves a smaller error. A zero point beside each
scale takes as much memory as groups of half the size, which are the more accurate. On a CPU with a C++ compiler
linear.cpp runs, on CUDA quantized_triton.py; elsewhere the weights are made whole for each product, which saves
memory and no time. Not here: which linears of a model are quantised (`rlhf.models.fused`), and gradients: quantised weights
are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rlhf.kernels import gpu, native
from rlhf.kernels.form import NATIVE, TORCH, TRITON, took
from rlhf.kernels.linear import multiply, pack, packed_linear

GROUPS = (32, 64, 128)  # inputs that share a scale of 4 bits
_BLOCK = 64  # outputs whose weights lie together for the native form
_LANES = 16
_SHRINKS = (1.0, 0.94, 0.88, 0.8)  # of a group's range, tried for the smallest error
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_AT_ONCE = 1 << 20  # weights that are quantised together


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (out, in) as `quantize` left it; in the native form's layout where `blocked`, with B = out / 64, rounded up.

    8 bits: values int8 (out, in), or blocked (B, in/2, 64, 2): pairs of inputs beside each other. 4 bits: bytes of two
    values + 8, (out, in/2): inputs j and j + in/2 in the low and high half; or blocked (B, in/2, 2, 16, 2): outputs i
    and i + 16 of 32.
    """

    values: torch.Tensor
    scales: torch.Tensor  # (out, in/group), or blocked (B, in/group, 64): fp32 of 8 bits, bf16 of 4
    shape: tuple[int, int]  # (out, in)
    bits: int
    group: int  # inputs that share a scale; of 8 bits all
    blocked: bool

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def can_quantize(shape: tuple[int, ...], bits: int, group: int = GROUPS[0]) -> bool:
    """Whether `quantize` takes a weight (out, in) of that shape."""
    return len(shape) == 2 and min(shape) > 0 and (bits == 8 or shape[1] % (2 * group) == 0)


def quantize(weight: torch.Tensor, bits: int, group: int = GROUPS[0]) -> QuantizedWeight:
    """weight (out, in), fp32, bf16 or fp16 -> its nearest with `bits` 8 or 4, on its device. `group` is of 4 bits. Raises
    ValueError for other shapes, dtypes and bits, and a weight that is not finite.
    """
    _check_weight(weight, bits, group)
    weight = weight.detach()
    blocked = weight.device.type == "cpu" and _native_takes(weight.shape)
    group = group if bits == 4 else weight.shape[1]
    rows = max(1, _AT_ONCE // weight.shape[1] // _BLOCK) * _BLOCK
    parts = [_rounded(part.float(), bits, group) for part in weight.split(rows)]
    if not all(bool(scales.isfinite().all()) for _, scales in parts):
        raise ValueError(
            f"weight {tuple(weight.shape)} has numbers that are not finite; it cannot be quantised"
        )
    laid = [
        (_in_blocks(v, bits), _scales_in_blocks(s)) if blocked else (_in_rows(v, bits), s) for v, s in parts
    ]
    values, scales = (torch.cat(x) for x in zip(*laid, strict=True))
    return QuantizedWeight(values, scales, tuple(weight.shape), bits, group, blocked)


def dequantize(q: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(out, in), rounded once to `dtype`."""
    scales = q.scales.transpose(1, 2).reshape(-1, q.scales.shape[1])[: q.shape[0]] if q.blocked else q.scales
    numbers = _of_blocks(q) if q.blocked else _of_rows(q)
    whole = numbers.view(q.shape[0], -1, q.group).float() * scales.float()[:, :, None]
    return whole.view(q.shape).to(dtype)


def quantized_linear(
    x: torch.Tensor, q: QuantizedWeight, bias: torch.Tensor | None = None, *, whole: int | None = None
) -> torch.Tensor:
    """x (..., in) fp32, bf16 or fp16, bias (out,) like x -> (..., out). Sums are in fp32. Of a part of a weight's rows, `whole`
    is how many rows the one has whose bits they keep. Raises ValueError for shapes, dtypes
    and devices that do not fit, and where a gradient is asked for: there is none.
    """
    _check(x, q, bias)
    rows = x.reshape(-1, x.shape[-1])
    if q.blocked and native.plain(rows, bias, q.values, q.scales):
        out = _native(rows, q, bias)
    elif gpu.serves(x):
        out = _triton(rows, q, bias, whole)
    else:
        took("quantized linear", TORCH)
        whole = dequantize(q, x.dtype)
        packed = pack(whole)
        out = F.linear(rows, whole, bias) if packed is None else packed_linear(rows, packed, bias)
    return out.view(*x.shape[:-1], q.shape[0])


def _check_weight(weight: torch.Tensor, bits: int, group: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: a weight can have 8 or 4")
    if group not in GROUPS:
        raise ValueError(f"group={group}: use one of {GROUPS}")
    if weight.dtype not in _DTYPES:
        raise ValueError(f"weight of {weight.dtype}; it must be fp32, bf16 or fp16")
    if not can_quantize(tuple(weight.shape), bits, group):
        inputs = (
            f"inputs in whole pairs of groups of {group}" if bits == 4 else "at least one input and output"
        )
        raise ValueError(f"weight {tuple(weight.shape)} for {bits} bits; it must be (out, in) with {inputs}")


def _check(x: torch.Tensor, q: QuantizedWeight, bias: torch.Tensor | None) -> None:
    shape, dtype = tuple(x.shape), x.dtype
    if not shape or shape[-1] != q.shape[1]:
        raise ValueError(f"x {shape} for a weight {q.shape}; its last size must be {q.shape[1]}")
    if dtype not in _DTYPES or x.device != q.values.device:
        raise ValueError(
            f"x of {dtype} on {x.device} for a weight on {q.values.device}; it must be fp32, bf16 or fp16, there"
        )
    if bias is not None and (bias.shape != q.shape[:1] or bias.dtype != dtype or bias.device != x.device):
        raise ValueError(
            f"bias {tuple(bias.shape)} of {bias.dtype} for x {shape} of {dtype} and a weight {q.shape}; it must be "
            f"({q.shape[0]},) of x's dtype and device"
        )
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            f"x {shape} or bias needs a gradient, and a weight of {q.bits} bits gives none: it is frozen; use "
            "torch.no_grad(), or the weight itself"
        )


# -- rounding ------------------------------------------------------------------------------------------------------------


def _rounded(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, in) fp32 -> int8 numbers (rows, in), scales (rows, in/group)."""
    groups = weight.view(len(weight), -1, group)
    if bits == 8:
        scales = groups.abs().amax(-1) / 127
        return _numbers(groups, scales, -127, 127).view(weight.shape).to(torch.int8), scales
    low, high = groups.aminmax(dim=-1)
    edge = torch.where(high > -low, high, low) / -8
    best = error = None
    for shrink in _SHRINKS:
        scales = (edge * shrink).bfloat16()
        numbers = _numbers(groups, scales.float(), -8, 7)
        found = torch.addcmul(groups, numbers, scales.float()[..., None], value=-1).square_().sum(-1)
        if best is None:
            best, error = (numbers, scales), found
            continue
        better = found < error
        error = torch.where(better, found, error)
        best = tuple(
            torch.where(better[..., None] if new.dim() == 3 else better, new, old)
            for new, old in zip((numbers, scales), best, strict=True)
        )
    return best[0].view(weight.shape).to(torch.int8), best[1]


def _numbers(groups: torch.Tensor, scales: torch.Tensor, least: int, most: int) -> torch.Tensor:
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    numbers = groups * inverse[..., None]
    if bool(inverse.isinf().any()):  # of scales too small for it
        numbers = torch.where(inverse.isinf()[..., None], groups / scales[..., None], numbers)
    return numbers.round_().clamp_(least, most)


# -- layouts -------------------------------------------------------------------------------------------------------------


def _in_rows(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return numbers
    low, high = (numbers + 8).to(torch.uint8).chunk(2, -1)
    return low | high << 4


def _of_rows(q: QuantizedWeight) -> torch.Tensor:
    if q.bits == 8:
        return q.values
    return torch.cat([q.values & 15, q.values >> 4], -1).to(torch.int8) - 8


def _in_blocks(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    numbers = _filled(numbers)
    pairs = numbers.view(-1, _BLOCK, numbers.shape[1] // 2, 2).transpose(1, 2)  # (B, in/2, 64, 2)
    if bits == 8:
        return pairs.contiguous()
    low, high = (pairs + 8).to(torch.uint8).unflatten(2, (2, 2, _LANES)).unbind(3)
    return low | high << 4


def _of_blocks(q: QuantizedWeight) -> torch.Tensor:
    pairs = q.values
    if q.bits == 4:
        pairs = torch.stack([pairs & 15, pairs >> 4], 3).flatten(2, 4).to(torch.int8) - 8
    return pairs.transpose(1, 2).reshape(-1, q.shape[1])[: q.shape[0]]


def _scales_in_blocks(scales: torch.Tensor) -> torch.Tensor:
    return _filled(scales).view(-1, _BLOCK, scales.shape[1]).transpose(1, 2).contiguous()


def _filled(rows: torch.Tensor) -> torch.Tensor:
    """Rows of 0 up to a whole block."""
    return F.pad(rows, (0, 0, 0, -len(rows) % _BLOCK))


# -- the forms -----------------------------------------------------------------------------------------------------------


def _native_takes(shape: torch.Size) -> bool:
    return shape[1] % 2 == 0 and native.library("linear") is not None


def _native(rows: torch.Tensor, q: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    took("quantized linear", NATIVE)
    if rows.dtype == torch.float16:
        return _native(rows.float(), q, None if bias is None else bias.float()).half()
    return multiply(
        rows, q.values.data_ptr(), *q.shape, bias, scales=q.scales.data_ptr(), group=q.group, bits=q.bits
    )


def _triton(
    rows: torch.Tensor, q: QuantizedWeight, bias: torch.Tensor | None, whole: int | None
) -> torch.Tensor:
    took("quantized linear", TRITON)
    from rlhf.kernels import quantized_triton

    return quantized_triton.quantized_linear(
        rows, q.values, q.scales, bias, bits=q.bits, group=q.group, whole=whole
    )
