"""y = x W^T + b whose rows do not depend on how many rows there are.

Here: the forward, bitwise the same row at every number of rows, with ordinary matrix products behind it in the
backward: on the CPU through oneDNN's prepacked weights (fp32 and bf16), few rows of them by linear.cpp where that gave
oneDNN's bits in a trial on this machine; on CUDA by matmul_triton.py (fp32, bf16 and fp16). Elsewhere, and for other
dtypes, `linear` is `torch.nn.functional.linear`, which promises nothing about rows. Not here: when a weight has changed
and must be packed again (`rlhf.models.linear`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from rlhf.kernels import gpu, native
from rlhf.kernels.first_order import first_order
from rlhf.kernels.form import NATIVE, ONEDNN, TORCH, TRITON, took

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
_WORTH_PACKING = 256  # rows, from which on a weight is packed for one product
_ROW_STEPS = ((16, 4), (256, 8), (512, 16))
FEW_ROWS = 48  # up to which linear.cpp is the faster one
_SOME, _SOME_STEP = 128, 8  # rows up to which it is where oneDNN's would be padded
_WORTH_A_KERNEL = 1 << 30  # products of which a twentieth takes as long as oneDNN to build a kernel
_MOST_KERNELS = 1024  # that oneDNN remembers
_BLOCK = 64  # outputs that oneDNN's pack keeps together
_SEGMENTS = (512, 1024)  # inputs that oneDNN may add up by themselves
_TRIAL_OUTS, _TRIAL_ROWS = 256, (56, 256)
ALONE = 1 << 20  # products that are not worth waking threads for
_layouts: dict[
    tuple[torch.Size, torch.dtype], bool
] = {}  # whether packs of a shape lie as linear.cpp reads them
_rounded_up: dict[tuple[int, int, int], int] = {}  # rows, outputs, inputs: products made of more rows
_segments: dict[tuple[torch.Size, torch.dtype, int], int] = {}
_has_kernel = torch.backends.mkldnn.is_available()
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default if _has_kernel else None  # looked up once
_address = torch.ops.mkldnn.data_ptr.default if _has_kernel else None
_size = torch.ops.mkldnn._nbytes.default if _has_kernel else None


class PackedWeight:
    """One weight in oneDNN's own layout, and which state of which tensor it was made from.

    A copy (deepcopy, pickle) is empty: packs are made again where they are needed.
    """

    __slots__ = ("_weight", "data", "source")

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None
        self.source: tuple[int, int, torch.dtype, torch.Size] | None = None
        self._weight: weakref.ref[torch.Tensor] | None = None

    def update(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The pack of `weight` as it is now, None where `can_pack` says no. Writes through `.data` leave no
        trace: after those, call `clear`.
        """
        source = (weight.data_ptr(), weight._version, weight.dtype, weight.shape)
        if source != self.source or self._weight() is not weight:  # memory is given to others again
            self.data, self.source, self._weight = pack(weight), source, weakref.ref(weight)
        return self.data

    def clear(self) -> None:
        self.data = self.source = self._weight = None

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return PackedWeight, ()


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `linear` has a row-invariant kernel for this (out, in) weight."""
    return (
        weight.device.type == "cpu"
        and type(weight) in native.PLAIN
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
        weight = weight.detach().contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        if (weight.shape, weight.dtype) not in _layouts:
            _look_at_layout(weight, packed)
        return packed


def _look_at_layout(weight: torch.Tensor, packed: torch.Tensor) -> None:
    """Notes whether packs of this shape lie as linear.cpp reads them: the first, the middle and the last block, bit by
    bit. A weight in which blocks in another order would look alike, as one of zeros, shows nothing."""
    outs, inner = weight.shape
    key = weight.shape, weight.dtype
    _layouts[key] = False
    size = -(-outs // _BLOCK) * _BLOCK * inner * weight.element_size()  # the last block is filled up
    if inner % 2 or _size(packed) != size:
        return
    bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
    memory = (ctypes.c_char * size).from_address(_address(packed))
    together = 1 if weight.dtype == torch.float32 else 2  # inputs of an output that lie beside each other
    blocks = torch.frombuffer(memory, dtype=bits).view(-1, inner // together, _BLOCK, together)
    for block in {0, len(blocks) // 2, len(blocks) - 1}:
        given = weight[block * _BLOCK : (block + 1) * _BLOCK].view(bits)
        found = blocks[block][:, : len(given)]
        if not torch.equal(given.view(len(given), -1, together).transpose(0, 1), found):
            return
        for one, other in ((given[1:], given[:-1]), (given[:, 1:], given[:, :-1])):
            if 2 * int((one != other).sum()) < one.numel():
                del _layouts[key]
                return
    _layouts[key] = True
    for stale in [x for x in _segments if x[:2] == key]:
        del _segments[stale]


def row_bucket(num_rows: int) -> int:
    """The number of rows that a caller may pad its rows to, to save a copy of x in every linear: oneDNN builds a kernel
    for each new number of rows (about 1 ms), so that numbers are rounded up to a few."""
    return (
        max(num_rows, 1)
        if num_rows <= FEW_ROWS and native.library("linear") is not None
        else _bucket(num_rows)
    )


def _bucket(num_rows: int) -> int:
    """At least 2: oneDNN adds up a single row of more than 1,024 inputs in an order of its own."""
    for limit, step in _ROW_STEPS:
        if num_rows <= limit:
            return max(2, -(-num_rows // step) * step) if num_rows > 2 else 2
    return -(-num_rows // 32) * 32


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out), differentiable in all three.

    `packed` is `pack(weight)`; without it this is `F.linear`, or on a GPU the row-invariant product there. Raises
    ValueError for shapes, dtypes and devices that do not fit.
    """
    if packed is not None and packed.shape != weight.shape:
        raise ValueError(
            f"packed {tuple(packed.shape)} is of another weight than {tuple(weight.shape)}; pack it again"
        )
    given = (x, weight) if bias is None else (x, weight, bias)
    try:
        if packed is None and not (_is_triton(*given) and x.numel() and weight.numel()):
            took("linear", TORCH)
            return F.linear(x, weight, bias)
        needs_grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        if torch.is_grad_enabled() and needs_grad:
            return _Linear.apply(x, weight, bias, packed)
        return _forward(x, weight, bias, packed)
    except (RuntimeError, IndexError, ValueError):
        _check(x, weight, bias)  # only now: this runs some thousand times a step, and torch refuses the same
        raise


def _is_triton(*tensors: torch.Tensor) -> bool:
    return gpu.serves(*tensors) and gpu.holds_tiles(tensors[0])


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    of_x, of_weight = tuple(x.shape), tuple(weight.shape)
    if len(of_weight) != 2 or of_x[-1:] != of_weight[1:]:
        raise ValueError(f"x {of_x} and weight {of_weight} must be (..., in) and (out, in)")
    if bias is not None and bias.shape != of_weight[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)} must be {of_weight[:1]} beside x {of_x} and weight {of_weight}"
        )
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise ValueError(f"{name} is {other.dtype} and x {x.dtype}; they must be the same")
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device} and x on {x.device}; move one of them")


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: torch.Tensor | None
) -> torch.Tensor:
    if packed is not None:
        return packed_linear(x, packed, bias)
    _check(x, weight, bias)
    from rlhf.kernels import matmul_triton

    took("linear", TRITON)
    return matmul_triton.linear(x, weight, bias)


def can_join(weights: Sequence[torch.Tensor], *, wholes: Sequence[int] | None = None) -> bool:
    """Whether one product with weights (out, in) of one input, one below another, gives each one's own bits: packs do, and on a
    GPU weights whose rows are cut into as many segments. `wholes`: of parts of weights, how many rows the whole ones have."""
    first = weights[0]
    if any(w.dtype != first.dtype or w.shape[1:] != first.shape[1:] for w in weights):
        return False
    if all(map(can_pack, weights)):
        return True
    if not _is_triton(*weights) or not all(w.numel() for w in weights):
        return False
    from rlhf.kernels import matmul_triton

    rows = [len(w) for w in weights] if wholes is None else wholes
    return len({matmul_triton.segments_of(n, first.shape[1]) for n in rows}) == 1


@torch.no_grad()
def one_below_another(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weights (out, in) as one (sum of outs, in): the memory that they lie in if they follow one another there, else a
    copy."""
    first, end = weights[0].detach(), weights[0].storage_offset()
    memory = first.untyped_storage().data_ptr()
    for w in weights:
        if not w.is_contiguous() or w.untyped_storage().data_ptr() != memory or w.storage_offset() != end:
            return torch.cat([x.detach() for x in weights])
        end += w.numel()
    shape = (sum(w.shape[0] for w in weights), *first.shape[1:])
    return first.as_strided(shape, first.stride())


def joined_linear(
    x: torch.Tensor, joined: torch.Tensor, bias: torch.Tensor | None, *, whole: int
) -> torch.Tensor:
    """On a GPU `linear` with weights that `can_join`, one below another, or with a part of a weight's rows, without gradient;
    `whole` is how many rows one of them, or the whole one, has."""
    _check(x, joined, bias)
    if not x.numel():
        return F.linear(x, joined, bias)
    from rlhf.kernels import matmul_triton

    took("linear", TRITON)
    return matmul_triton.linear(x, joined, bias, whole=whole)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` with the pack alone, without gradient. A column does not depend on the columns beside it, so a
    pack of concatenated weights gives each weight's own bits."""
    few, shape = packed.__dict__.get("few") or _FewRows(packed), x.shape
    if not shape:
        raise ValueError(f"x () is a single number; it must be (..., {few.inner})")
    num_rows = x.numel() // few.inner
    if 0 < num_rows <= _SOME and (num_rows <= FEW_ROWS or num_rows % _SOME_STEP):
        if few.takes(x, bias) and shape[-1] == few.inner and (segment := few.segment(packed)):
            took("linear", NATIVE)
            return multiply(x, few.address, few.outs, few.inner, bias, group=segment)
    took("linear", ONEDNN)
    rows = x.reshape(-1, shape[-1])
    extra = _rows_wanted(num_rows, few.outs, few.inner) - num_rows
    if extra:
        rows, given = rows.new_empty(num_rows + extra, shape[-1]), rows
        rows[:num_rows] = given
    out = _linear_pointwise(rows, packed, bias, "none", [], "")
    # not a view, which autograd would not let a model write into
    return out.resize_(*shape[:-1], out.shape[-1]) if extra or len(shape) != 2 else out


def _rows_wanted(num_rows: int, outs: int, inner: int) -> int:
    """How many rows oneDNN is given: rounded up to a few numbers, until copies of x and rows in vain took about as long as a
    kernel for these many takes to build."""
    wanted = _bucket(num_rows)
    if wanted == num_rows or num_rows < 2:
        return wanted
    key = num_rows, outs, inner
    done = _rounded_up.get(key, 0)
    if done >= _WORTH_A_KERNEL:
        return num_rows
    if len(_rounded_up) >= _MOST_KERNELS:
        _rounded_up.clear()
    _rounded_up[key] = done + num_rows * outs * inner
    return wanted


class _FewRows:
    """What linear.cpp needs to know of a pack, asked for once: some thousand products of a step are over in microseconds."""

    __slots__ = ("_bias_shape", "_dtype", "_found", "_threads", "address", "inner", "outs")

    def __init__(self, packed: torch.Tensor) -> None:
        if packed.layout is not torch._mkldnn:
            raise ValueError(
                f"packed {tuple(packed.shape)} is an ordinary tensor; it must be what `pack` gives"
            )
        self.outs, self.inner = packed.shape
        self.address, self._dtype, self._bias_shape = _address(packed), packed.dtype, packed.shape[:1]
        self._found, self._threads = 0, 0
        packed.few = self

    def takes(self, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether x and bias are of the kind and bias of the size; what does not fit is oneDNN's to refuse."""
        dtype = self._dtype
        return (
            x.dtype is dtype
            and x.is_cpu
            and (bias is None or (bias.dtype is dtype and bias.is_cpu and bias.shape == self._bias_shape))
            and native.plain(x, bias)
        )

    def segment(self, packed: torch.Tensor) -> int:
        """`_segment` of the pack with as many threads as there are now."""
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._found, self._threads = _segment(packed), threads
        return self._found


def multiply(
    x: torch.Tensor,
    weights: int,
    outs: int,
    inner: int,
    bias: torch.Tensor | None,
    *,
    group: int,
    scales: int = 0,
    bits: int = 0,
) -> torch.Tensor:
    """linear.cpp's product of x (..., in), fp32 or bf16, with weights (out, in) at the address `weights`, in its layout; bits
    0 are those of x."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    num_rows = x.numel() // inner
    out = x.new_empty(num_rows, outs) if x.dim() == 2 else x.new_empty(*x.shape[:-1], outs)
    native.function("linear", "linear_forward")(
        x.data_ptr(), weights, scales, 0 if bias is None else bias.data_ptr(), out.data_ptr(),
        num_rows, inner, outs, group, bits, x.dtype is torch.bfloat16,
        1 if num_rows * outs * inner <= ALONE else torch.get_num_threads(),
    )  # fmt: skip
    return out


def native_form(packed: torch.Tensor) -> tuple[int, int] | None:
    """The address of a pack that linear.cpp reads, and the `group` with which it gives oneDNN's bits with as many threads as
    there are now; None where it does not."""
    few = packed.__dict__.get("few") or _FewRows(packed)
    segment = few.segment(packed)
    return (few.address, segment) if segment else None


def _segment(packed: torch.Tensor) -> int:
    """How many inputs oneDNN adds up by themselves, so that linear.cpp gives its bits for packs of that shape, with as many
    threads; 0 where it does not, or where the layout is another or not known."""
    key = packed.shape, packed.dtype, torch.get_num_threads()
    found = _segments.get(key)
    if found is None:
        found = _segments[key] = _try_segments(packed) if _layouts.get(key[:2]) else 0
    return found


def _try_segments(packed: torch.Tensor) -> int:
    """By what a weight of few outputs gives for few and for many rows, and this one for few."""
    outs, inner = packed.shape
    if native.library("linear") is None:
        return 0
    generator = torch.Generator().manual_seed(0)
    few = min(outs, _TRIAL_OUTS - -outs % _BLOCK)  # with a last block of the same size
    weight, x, bias = (
        torch.randn(shape, generator=generator).to(packed.dtype)
        for shape in ((few, inner), (_TRIAL_ROWS[-1], inner), (few,))
    )
    small = pack(weight)
    if not _layouts[weight.shape, weight.dtype]:
        return 0
    found = {min(s, inner) for s in _SEGMENTS}
    trials = [(x[:rows], small, b) for rows in _TRIAL_ROWS for b in (None, bias)]
    for rows, of, b in (*trials, (x[: _TRIAL_ROWS[0]], packed, None)):
        wanted = _linear_pointwise(rows, of, b, "none", [], "")
        found = {s for s in found if torch.equal(multiply(rows, _address(of), *of.shape, b, group=s), wanted)}
    return min(found, default=0)


def times_weight(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows (M, out), weight (out, in) -> rows weight (M, in), for backwards: no gradient, no promise about rows. In
    fp32 oneDNN's kernel takes up to a third less time than torch's product, packing included."""
    if weight.dtype == torch.float32 and rows.shape[0] >= _WORTH_PACKING and can_pack(weight):
        return packed_linear(rows, pack(weight.t()))
    return rows @ weight


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        packed: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias, packed)

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
