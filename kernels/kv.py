"""Pages of keys and values: the formats they can have, and how the keys and values of new tokens come into them.

Here: pages (P, Hkv, page, D) in the model's dtype, or in int8 or fp8 (e4m3) beside fp32 scales (P, Hkv, page), one for
each token and key head: number * scale is the value. The scale is the largest |value| over the format's largest number;
values are rounded to the nearest, ties to even. A token's numbers and scale depend on its own values only. A row that
holds an infinity or a NaN has scale NaN. On CUDA kv_triton.py writes, and can norm and rotate the heads of q and k in the same pass.
Not here: attention over pages (`rlhf.kernels.attention`); which page belongs to whom (`rlhf.rollout.cache`).
"""

from __future__ import annotations

import numpy as np
import torch

from rlhf.kernels import gpu, native
from rlhf.kernels.form import NATIVE, TORCH, TRITON, took
from rlhf.kernels.layout import heads_together

QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # formats with scales, and their largest number
PAGE_STEP = 16  # tokens of a page are a multiple of this
PAGE_BYTES = 16  # the address of pages is one of this
KvScales = tuple[torch.Tensor, torch.Tensor]  # of keys and values, (P, Hkv, page) fp32 each

_SMALLEST = 1e-30  # rows without a larger number are written as if this were theirs
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inverse_of(dtype: torch.dtype) -> float:
    """1 / the largest number of a format, as fp32 holds it."""
    return float(np.float32(1.0) / np.float32(QUANTISED[dtype]))


def quantised(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., D) as numbers (..., D) of a format in QUANTISED and fp32 scales (...)."""
    x = x.float()
    top = x.abs().amax(-1)
    finite = top.isfinite()
    factor = torch.full_like(top, QUANTISED[dtype]).div_(top.clamp(min=_SMALLEST))
    numbers = torch.where(finite[..., None], x * factor[..., None], 0.0)
    numbers = numbers.round_() if dtype == torch.int8 else numbers
    return numbers.to(dtype), torch.where(finite, top * inverse_of(dtype), float("nan"))


def write_kv(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    *,
    kv_scales: KvScales | None = None,
) -> None:
    """Put k, v (N, Hkv, D) of N new tokens into pages (P, Hkv, page, D), and their scales into `kv_scales` where the pages
    are int8 or fp8; slot = page * page_tokens + place in it, int64. Raises ValueError for what does not fit."""
    check_pages(k_pages, v_pages, kv_scales)
    check_slots(slots, k_pages)
    rows = kv_rows(slots, k_pages.shape[1], k_pages.shape[2])
    write_rows(k_pages, v_pages, k, v, rows, kv_scales=kv_scales)


def check_slots(slots: torch.Tensor, pages: torch.Tensor) -> None:
    """Raise ValueError for slots (N,) that are not in the pages (P, Hkv, page, D)."""
    places = pages.shape[0] * pages.shape[2]
    if slots.dim() != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots {tuple(slots.shape)} of {slots.dtype} must be (N,) int64")
    if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < places:
        raise ValueError(
            f"slots from {int(slots.min())} to {int(slots.max())} for pages {tuple(pages.shape)}, which have places 0 "
            f"to {places - 1}"
        )


def kv_rows(slots: torch.Tensor, num_kv_heads: int, page_tokens: int) -> torch.Tensor:
    """(N*Hkv,) rows of pages seen as (P*Hkv*page, D) for slots (N,): the same in every layer."""
    if slots.is_cpu and type(slots) in native.PLAIN:  # numpy takes a fifth of torch's time for few
        page, place = np.divmod(slots.numpy(), page_tokens)
        heads = np.arange(num_kv_heads) * page_tokens
        return torch.from_numpy(((page * (num_kv_heads * page_tokens) + place)[:, None] + heads).ravel())
    first = slots.div(page_tokens, rounding_mode="floor") * (num_kv_heads * page_tokens) + slots.remainder(
        page_tokens
    )
    return (first[:, None] + torch.arange(num_kv_heads, device=slots.device) * page_tokens).view(-1)


def write_rows(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    *,
    kv_scales: KvScales | None = None,
) -> None:
    """`write_kv` with rows from `kv_rows`. Raises ValueError for what does not fit, and on a CPU for rows that are not in the
    pages; elsewhere reading them would wait for the device, and `check_slots` must have seen their slots."""
    _check_new(k_pages, v_pages, k, v, rows)
    if rows.is_cpu:
        _check_rows(rows, k_pages)
    for i, (pages, x) in enumerate(((k_pages, k), (v_pages, v))):
        scales = None if kv_scales is None else kv_scales[i]
        if x.is_cpu and _is_native(pages, x, scales, rows):
            took("keys and values", NATIVE)
            _write_native(pages, scales, x, rows)
        elif (
            scales is not None and gpu.serves(x) and x.shape[-1] <= gpu.LARGEST_HEAD and x.shape[-1] % 2 == 0
        ):
            from rlhf.kernels import kv_triton

            took("keys and values", TRITON)
            kv_triton.write(pages, scales, heads_together(x), rows)
        elif scales is None:
            took("keys and values", TORCH)
            pages.view(-1, x.shape[-1]).index_copy_(0, rows, x.reshape(-1, x.shape[-1]).to(pages.dtype))
        else:
            took("keys and values", TORCH)
            numbers, own = quantised(x.reshape(-1, x.shape[-1]), pages.dtype)
            as_bytes(pages).view(-1, x.shape[-1]).index_copy_(0, rows, as_bytes(numbers))
            scales.view(-1).index_copy_(0, rows, own)


def writes_in_one_pass(
    q: torch.Tensor, k_pages: torch.Tensor, cos: torch.Tensor, norm_weights: torch.Tensor | None
) -> bool:
    """Whether `norm_rotate_write` takes q (N, Hq, D), pages, cos (N, D) and weights: on CUDA, where all of a head is
    rotated."""
    tensors = (q, cos) if norm_weights is None else (q, cos, norm_weights)
    return (
        gpu.serves(*tensors)
        and cos.shape[-1] == q.shape[-1] <= gpu.LARGEST_HEAD
        and (k_pages.dtype == q.dtype or k_pages.dtype in QUANTISED)
    )


def norm_rotate_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    rows: torch.Tensor,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_weights: torch.Tensor | None = None,
    eps: float = 0.0,
    kv_scales: KvScales | None = None,
) -> torch.Tensor:
    """`rms_norm` of the heads of q (N, Hq, D) and k (N, Hkv, D) by norm_weights (Hq + Hkv, D) where there are any, `rotate`
    of both, and `write_rows` of k and v: in their bits, and in one kernel. -> q (N, Hq, D), new.

    q, k and v may lie side by side in one tensor. Only where `writes_in_one_pass`; raises ValueError for shapes that
    do not fit, and where there is no such kernel.
    """
    if not gpu.serves(q):
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} on {q.device} is norm_rotate_write's where writes_in_one_pass says so; use "
            "rms_norm, rotate and write_rows"
        )
    from rlhf.kernels import kv_triton

    _check_new(k_pages, v_pages, k, v, rows)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    alike = len(q) == len(k) and q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 2 == 0
    if not alike or not cos.shape == sin.shape == (len(q), q.shape[2]):
        raise ValueError(
            f"{shapes}: q, k and v need the same tokens and even heads' size D, cos and sin (N, D)"
        )
    wanted = (q.shape[1] + k.shape[1], q.shape[2])
    if norm_weights is not None and norm_weights.shape != wanted:
        raise ValueError(f"norm_weights {tuple(norm_weights.shape)} for {shapes}; they must be {wanted}")
    given = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "norm_weights": norm_weights}
    kinds = {name: (x.dtype, x.device) for name, x in given.items() if x is not None}
    if len(set(kinds.values())) > 1:
        about = ", ".join(f"{name} {dtype} on {device}" for name, (dtype, device) in kinds.items())
        raise ValueError(f"{about} must be alike")
    q, k, v = map(heads_together, (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    weights = None if norm_weights is None else norm_weights.contiguous()
    took("keys and values", TRITON)
    return kv_triton.norm_rotate_write(q, k, v, k_pages, v_pages, rows, cos, sin, weights, eps, kv_scales)


def check_pages(k_pages: torch.Tensor, v_pages: torch.Tensor, kv_scales: KvScales | None) -> None:
    """Raise ValueError for pages (P, Hkv, page, D) and scales (P, Hkv, page) that no operation takes."""
    shape = k_pages.shape
    if len(shape) != 4 or v_pages.dim() != 4 or shape[:3] != v_pages.shape[:3]:
        raise ValueError(
            f"k_pages {tuple(shape)} and v_pages {tuple(v_pages.shape)} must be (P, Hkv, page, D), alike but for D"
        )
    if shape[2] % PAGE_STEP or not shape[2]:
        raise ValueError(
            f"k_pages {tuple(shape)} have pages of {shape[2]} tokens; it must be a multiple of {PAGE_STEP}"
        )
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError(
            f"k_pages {tuple(shape)} with strides {k_pages.stride()} and v_pages with {v_pages.stride()}: pages must be contiguous"
        )
    if native.plain(k_pages, v_pages) and (k_pages.data_ptr() | v_pages.data_ptr()) % PAGE_BYTES:
        raise ValueError(
            f"k_pages {tuple(shape)} and v_pages {tuple(v_pages.shape)} begin at {k_pages.data_ptr()} and {v_pages.data_ptr()}: "
            f"pages must begin at a multiple of {PAGE_BYTES} bytes"
        )
    dtype = k_pages.dtype
    if dtype != v_pages.dtype or k_pages.device != v_pages.device:
        raise ValueError(
            f"k_pages {dtype} on {k_pages.device} and v_pages {v_pages.dtype} on {v_pages.device} must be alike"
        )
    if kv_scales is None:
        if dtype not in _FLOATS:
            raise ValueError(f"pages of {dtype} need kv_scales, two tensors {tuple(shape[:3])} fp32")
        return
    if dtype not in QUANTISED:
        raise ValueError(f"kv_scales are for pages of int8 or float8_e4m3fn, not {dtype}")
    for scales in kv_scales:
        wrong = scales.dtype != torch.float32 or scales.device != k_pages.device or not scales.is_contiguous()
        if wrong or scales.shape != shape[:3]:
            raise ValueError(
                f"kv_scales {tuple(scales.shape)} {scales.dtype} on {scales.device} for pages {tuple(shape)} on "
                f"{k_pages.device}; they must be contiguous fp32 {tuple(shape[:3])} there"
            )


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Numbers of one byte as uint8: torch moves few kinds of them. Others as they are."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _check_new(
    k_pages: torch.Tensor, v_pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor
) -> None:
    for name, pages, x in (("k", k_pages, k), ("v", v_pages, v)):
        if x.dim() != 3 or x.shape[1] != pages.shape[1] or x.shape[2] != pages.shape[3]:
            raise ValueError(
                f"{name} {tuple(x.shape)} for {name}_pages {tuple(pages.shape)}: it must be (N, Hkv, D) with their Hkv and D"
            )
        if x.dtype not in _FLOATS or x.device != pages.device:
            raise ValueError(f"{name} {x.dtype} on {x.device} cannot be written to pages on {pages.device}")
    if k.shape[0] != v.shape[0] or rows.shape != (k.shape[0] * k.shape[1],):
        raise ValueError(
            f"rows {tuple(rows.shape)} for k {tuple(k.shape)} and v {tuple(v.shape)}; one for each head"
        )
    if rows.dtype != torch.int64 or not rows.is_contiguous() or rows.device != k_pages.device:
        raise ValueError(
            f"rows {rows.dtype} with stride {rows.stride()} on {rows.device} for pages on {k_pages.device}: they must be int64, "
            "without gaps, beside them"
        )


def _check_rows(rows: torch.Tensor, pages: torch.Tensor) -> None:
    """Raise ValueError for rows (N*Hkv,) on a CPU that are not in the pages (P, Hkv, page, D)."""
    if not native.plain(rows):
        return
    end = pages.numel() // pages.shape[3]
    if native.library("attention") is not None:  # this is asked in every layer
        native.function("attention", "check_rows")(rows.data_ptr(), len(rows), end)
    elif len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < end:
        raise ValueError(
            f"rows from {int(rows.min())} to {int(rows.max())} of pages that have 0 to {end - 1}"
        )


def _is_native(pages: torch.Tensor, x: torch.Tensor, scales: torch.Tensor | None, rows: torch.Tensor) -> bool:
    fits = scales is None or (x.shape[-1] % 16 == 0 and x.dtype in (torch.float32, torch.bfloat16))
    return fits and native.plain(pages, x, scales, rows) and native.library("attention") is not None


def _write_native(
    pages: torch.Tensor, scales: torch.Tensor | None, x: torch.Tensor, rows: torch.Tensor
) -> None:
    x, size = heads_together(x.to(pages.dtype) if scales is None else x), pages.element_size()
    tokens, heads, dim = x.shape
    places = x.data_ptr(), rows.data_ptr(), pages.data_ptr()
    if scales is None:
        write = native.function("attention", "write_rows")
        write(*places, tokens, heads, x.stride(0) * size, dim * size)
        return
    write = native.function("attention", "write_quantised")
    kinds = x.dtype == torch.bfloat16, pages.dtype == torch.float8_e4m3fn
    most = QUANTISED[pages.dtype], inverse_of(pages.dtype)
    write(*places, scales.data_ptr(), tokens, heads, x.stride(0), dim, *kinds, *most)
