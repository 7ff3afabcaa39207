"""Attention on a GPU: packs and their gradients, chunks of pages, decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.gpu.measure import DEVICE, TOLERANCES, Check, Timing, close, kind, made, same, time_ms
from rlhf.kernels import attention_triton, kv_triton
from rlhf.kernels.attention import TILE, Plan, attend_packed, attend_paged
from rlhf.kernels.kv import (
    KvScales,
    kv_rows,
    norm_rotate_write,
    quantised,
    write_kv,
    write_rows,
)
from rlhf.kernels.norm import rms_norm
from rlhf.kernels.rotary import rotate

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

GOALS = {"decode attention": 0.85, "attention forward": 0.60, "attention backward": 0.45}  # on an H200
_WRITE_GOAL = 0.85

# whose bits are looked at in small contexts: what is compiled first, and a head that fills no power of 2
_SMALL: tuple[tuple[torch.dtype, int, str | None, dict[str, Any]], ...] = (
    (torch.bfloat16, 64, None, {"window": 128, "has_sinks": True}),
    (torch.float16, 96, None, {}),
    (torch.float16, 64, None, {}),
    (torch.float16, 128, None, {}),
    (torch.float16, 256, None, {}),
    (torch.bfloat16, 96, None, {}),
    (torch.bfloat16, 256, None, {}),
    (torch.float32, 96, None, {}),
    (torch.float32, 256, None, {}),
    (torch.bfloat16, 128, None, {"window": 128}),
    (torch.bfloat16, 128, "int8", {"window": 128}),
    (torch.bfloat16, 256, None, {"window": 128, "softcap": 20.0}),
)
_HEADS, _KV_HEADS, _PAGE = 8, 2, 64  # of what bits are looked at
_SMALL_LENS = {True: [20, 150], False: [17, 300, 1100]}


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    for dim in (64, 128, 256):
        yield from _calls(dtype, dim)
    if dtype != torch.float16:
        yield from _quantised_calls(dtype)
    if dtype == torch.bfloat16:
        yield from _write_calls(dtype)
        yield from _masked_calls(dtype)
        yield from _calls(dtype, 128, ", a window of 128", window=128)
        yield from _calls(dtype, 256, ", a window and a softcap", window=128, softcap=20.0)
        yield from _calls(dtype, 64, ", a window and sinks", window=128, has_sinks=True)
        yield from _calls(dtype, 128, ", 1 query head a key head", heads=2)
        yield from _calls(dtype, 128, ", 64 query heads a key head", heads=128)
        yield from _quantised_calls(dtype, window=128)
        yield from _prefix_calls(dtype)


def checks(quick: bool) -> Iterator[Check]:
    for dtype, tolerance in TOLERANCES.items():
        yield from _values(dtype, tolerance, quick)
    for dtype in (torch.bfloat16, torch.float32):
        yield from _bits(dtype, quick)
        for stored in FORMATS:
            yield from _bits(dtype, quick, stored)
        yield from _one_pass(dtype, quick)
    for dtype, dim, stored, options in _SMALL[: 2 if quick else None]:
        yield from _bits(dtype, quick, stored, lens=_SMALL_LENS[quick], dim=dim, **options)
    for dtype in (torch.bfloat16,) if quick else TOLERANCES:
        yield from _with_sinks(dtype, quick)
        yield from _with_a_block_mask(dtype, quick)
        yield from _with_a_prefix(dtype, quick)
    yield from _near_full_precision(quick)


def timings(top: dict[str, float]) -> Iterator[Timing]:
    for dim, heads, kv_heads in ((128, 32, 8), (128, 16, 8), (64, 32, 8)):
        for batch, context in ((32, 1024), (32, 8192), (128, 2048), (1, 8192)):
            for stored in (None, *FORMATS):
                yield _decode(top, batch, context, dim, heads, kv_heads, stored)
        for length in (2048, 8192):
            yield from _prefill(top, length, dim, heads, kv_heads)
        yield _mixed(top, 32, 8192, dim, heads, kv_heads)
    for tokens in (256, 8192):
        for stored in (None, *FORMATS):
            yield _written(top, tokens, 128, 16, 8, stored)


def _calls(
    dtype: torch.dtype,
    dim: int,
    about: str = "",
    *,
    heads: int = 8,
    window: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
) -> Iterator[tuple[str, Callable[[], Any]]]:
    q, k = (torch.zeros(1000, count, dim, dtype=dtype) for count in (heads, 2))
    pages, table = torch.zeros(40, 2, 64, dim, dtype=dtype), torch.arange(40)[:22].view(2, 11)
    sinks = torch.zeros(heads) if has_sinks else None
    options = {"scale": 0.1, "window": window, "softcap": softcap, "sinks": sinks}
    pack, chunks, decode = (
        Plan([700, 300], [700, 300]),
        Plan([300, 20], [700, 300], page_table=table, page_tokens=64),
        Plan([1, 1], [700, 300], page_table=table, page_tokens=64),
    )
    logs = torch.zeros(1000, heads)
    forward = functools.partial(attention_triton.forward, share_out=True)
    about = f"{dim}{about}"
    yield f"attention {about}", lambda: forward(q, k, k, pack, **options)
    yield (
        f"attention backward {about}",
        lambda: attention_triton.gradients(q, k, k, q, logs, q, pack, **options),
    )
    yield f"attention, chunks of pages {about}", lambda: forward(q[:320], pages, pages, chunks, **options)
    yield f"attention, decode {about}", lambda: forward(q[:2], pages, pages, decode, **options)


def _quantised_calls(
    dtype: torch.dtype, dim: int = 128, window: int | None = None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Of fp32, and of a window, few, since what differs there is little."""
    table, scales = torch.arange(40)[:22].view(2, 11), (torch.zeros(40, 2, 64),) * 2
    options = {"scale": 0.1, "window": window, "softcap": None, "sinks": None, "share_out": True}
    about = f"{dim}" if window is None else f"{dim}, a window of {window}"

    def call(stored: str, lens: list[int]) -> Any:
        pages = torch.zeros(40, 2, 64, dim, dtype=FORMATS[stored])
        plan = Plan(lens, [700, 300], page_table=table, page_tokens=64)
        q = torch.zeros(sum(lens), 8, dim, dtype=dtype)
        return attention_triton.forward(q, pages, pages, plan, kv_scales=scales, **options)

    yield f"attention, decode of int8 {about}", lambda: call("int8", [1, 1])
    if dtype == torch.bfloat16:
        yield f"attention, chunks of int8 pages {about}", lambda: call("int8", [300, 20])
    if dtype == torch.bfloat16 and window is None:
        yield f"attention, decode of fp8 {dim}", lambda: call("fp8", [1, 1])
        yield f"attention, decode of fp8's bits {dim}", lambda: _without_fp8(lambda: call("fp8", [1, 1]))


def _without_fp8(call: Callable[[], Any]) -> Any:
    with mock.patch.object(attention_triton, "_has_fp8", lambda device: False):
        return call()


def _write_calls(dtype: torch.dtype, dim: int = 128) -> Iterator[tuple[str, Callable[[], Any]]]:
    q, k, cos = (torch.zeros(64, *shape, dtype=dtype) for shape in ((8, dim), (2, dim), (dim,)))
    weights, rows, both = torch.zeros(10, dim, dtype=dtype), torch.arange(128), (torch.zeros(4, 2, 64),) * 2
    for stored, scales in ((dtype, None), *((x, both) for x in FORMATS.values())):
        pages = torch.zeros(4, 2, 64, dim, dtype=stored)
        yield (
            f"norm, rotate and write {kind(stored)}",
            lambda p=pages, s=scales: kv_triton.norm_rotate_write(
                q, k, k, p, p, rows, cos, cos, weights, 1e-6, s
            ),
        )
        if scales is not None:
            yield f"write {kind(stored)}", lambda p=pages, s=scales: kv_triton.write(p, s[0], k, rows)


def _masked_calls(dtype: torch.dtype, dim: int = 128) -> Iterator[tuple[str, Callable[[], Any]]]:
    plan = Plan([1000], [1000], block_mask=torch.ones(8, 8, dtype=torch.bool))
    options = {"scale": 0.1, "window": None, "softcap": None, "sinks": None}
    q, k = (torch.zeros(1000, heads, dim, dtype=dtype) for heads in (8, 2))
    logs, forward = torch.zeros(1000, 8), functools.partial(attention_triton.forward, share_out=False)
    yield "attention with a block mask", lambda: forward(q, k, k, plan, **options)
    yield (
        "attention backward with a block mask",
        lambda: attention_triton.gradients(q, k, k, q, logs, q, plan, **options),
    )


def _prefix_calls(dtype: torch.dtype, dim: int = 128) -> Iterator[tuple[str, Callable[[], Any]]]:
    plan = Plan([300, 200, 500], [300, 500, 800], prefix_starts=[0, 0, 0])
    options = {"scale": 0.1, "window": None, "softcap": None, "sinks": None}
    q, k = (torch.zeros(1000, heads, dim, dtype=dtype) for heads in (8, 2))
    logs, forward = torch.zeros(1000, 8), functools.partial(attention_triton.forward, share_out=False)
    yield "attention of a shared prefix", lambda: forward(q, k, k, plan, **options)
    yield (
        "attention backward of a shared prefix",
        lambda: attention_triton.gradients(q, k, k, q, logs, q, plan, **options),
    )


def _values(dtype: torch.dtype, tolerance: float, quick: bool) -> Iterator[Check]:
    lens = [5, 40] if quick else [5, 700, 1, 300, 64]
    options: list[dict[str, Any]] = (
        [{}, {"window": 20}] if quick else [{}, {"window": 100}, {"softcap": 20.0}]
    )
    for dim in (64,) if quick else (64, 96, 128, 192, 256):
        for heads, kv_heads in ((4, 2),) if quick else ((4, 4), (8, 2), (5, 1)):
            n = sum(lens)
            q, k, v = (
                made(n, h, dim, dtype=dtype, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads))
            )
            for given in options:
                plan = Plan(lens, lens, device=DEVICE)
                yield from close(
                    f"attention {dim} {heads}/{kv_heads} {kind(dtype)} {given or ''}",
                    lambda q, k, v, p=plan, o=given: attend_packed(q, k, v, p, scale=q.shape[-1] ** -0.5, **o),
                    q, k, v, tolerance=tolerance,
                )  # fmt: skip


@dataclass(frozen=True)
class _Sequences:
    """Sequences packed and in pages: the same q (N, Hq, D), k and v (N, Hkv, D)."""

    lens: list[int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    scales: KvScales | None
    table: torch.Tensor  # (S, pages)
    slots: torch.Tensor  # (N,)
    options: dict[str, Any]

    @property
    def starts(self) -> list[int]:
        return [sum(self.lens[:i]) for i in range(len(self.lens))]

    def packed(self, v: torch.Tensor | None = None, **of_plan: Any) -> torch.Tensor:
        plan = Plan(self.lens, self.lens, device=DEVICE, **of_plan)
        return attend_packed(self.q, self.k, self.v if v is None else v, plan, **self.options)

    def alone(self, own: slice) -> torch.Tensor:
        plan = Plan([own.stop - own.start], [own.stop - own.start], device=DEVICE)
        return attend_packed(self.q[own], self.k[own], self.v[own], plan, **self.options)

    def last(self, counts: list[int], **of_plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of so many last tokens of each, and their outputs from pages."""
        ends = [start + length for start, length in zip(self.starts, self.lens)]
        own = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts)]).to(DEVICE)
        plan = Plan(
            counts, self.lens, page_table=self.table, page_tokens=_PAGE, device=DEVICE, **of_plan
        )  # fmt: skip
        pages = self.k_pages, self.v_pages
        return own, attend_paged(self.q[own], *pages, plan, kv_scales=self.scales, **self.options)


def _sequences(
    dtype: torch.dtype,
    lens: list[int],
    dim: int,
    stored: str | None = None,
    has_sinks: bool = False,
    **options: Any,
) -> _Sequences:
    n, each = sum(lens), -(-max(lens) // _PAGE)
    q, k, v = (made(n, h, dim, dtype=dtype, seed=i) for i, h in enumerate((_HEADS, _KV_HEADS, _KV_HEADS)))
    table = torch.randperm(each * len(lens), generator=torch.Generator().manual_seed(3)).view(len(lens), -1)
    pages = _pages(table.numel(), _KV_HEADS, _PAGE, dim, stored, dtype)
    slots = torch.cat(
        [
            table[s, torch.arange(length) // _PAGE] * _PAGE + torch.arange(length) % _PAGE
            for s, length in enumerate(lens)
        ]
    ).to(DEVICE)
    write_kv(*pages[:2], k, v, slots, kv_scales=pages[2])
    sinks = made(_HEADS, dtype=torch.float32, seed=4) if has_sinks else None
    return _Sequences(
        lens, q, k, v, *pages, table, slots, {"scale": dim**-0.5, "sinks": sinks, **options}
    )  # fmt: skip


def _bits(
    dtype: torch.dtype,
    quick: bool,
    stored: str | None = None,
    lens: list[int] | None = None,
    dim: int | None = None,
    **options: Any,
) -> Iterator[Check]:
    """Packed, in chunks from pages, and token after token: the same numbers. Of pages in another format whole prompts from
    pages are the standard; in fp32 they are the pack of what the pages hold."""
    dim = dim or (64 if quick else 128)
    both = _sequences(dtype, lens or ([20, 300] if quick else [17, 300, 1025, 700]), dim, stored, **options)
    about = f"{dim} {kind(dtype)}{f' with {stored} pages' if stored else ''} {options or ''}".strip()
    packed = both.packed() if stored is None else both.last(both.lens)[1]
    if stored is not None and dtype == torch.float32:
        yield same(f"attention {about}, the pack of their values", packed, _of_values(both))
    for alone, (start, length) in enumerate(zip(both.starts, both.lens) if stored is None else ()):
        own = slice(start, start + length)
        yield same(f"attention {about}, sequence {alone} alone", both.alone(own), packed[own])
    steps = {  # how many of every sequence's last tokens
        f"the last {chunk}": [min(chunk, length) for length in both.lens]
        for chunk in ((300,) if quick else (1, 2, 64, 100, 300))
    }
    steps["decoding beside chunks"] = [
        min(1 if s % 2 else 200, length) for s, length in enumerate(both.lens)
    ]  # fmt: skip
    for name, counts in steps.items():
        own, got = both.last(counts)
        yield same(f"attention {about}, {name} from pages", got, packed[own])
    if stored is None:
        yield from _not_finite(about, both, packed, options.get("window"))


def _of_values(both: _Sequences) -> torch.Tensor:
    """The pack of what quantised pages hold."""
    n, heads, dim = both.k.shape
    rows = kv_rows(both.slots, heads, _PAGE)
    held = [
        (x.float() * s[..., None]).view(-1, dim)[rows].view(n, heads, dim)
        for x, s in zip((both.k_pages, both.v_pages), both.scales)
    ]
    plan = Plan(both.lens, both.lens, device=DEVICE)
    return attend_packed(both.q, *held, plan, **both.options)


def _not_finite(about: str, both: _Sequences, packed: torch.Tensor, window: int | None) -> Iterator[Check]:
    """An infinite value in the middle of the last sequence reaches what sees it and nothing else, packed and from pages."""
    at = both.starts[-1] + both.lens[-1] // 2
    rows = torch.arange(len(both.q), device=DEVICE)
    sees = rows >= at if window is None else (rows >= at) & (rows < at + window)
    v = both.v.clone()
    v[at] = torch.inf
    write_kv(both.k_pages, both.v_pages, both.k, v, both.slots, kv_scales=both.scales)
    last = [min(length, length // 2 + 20) for length in both.lens]
    (own, from_pages), got = both.last(last), both.packed(v)
    write_kv(both.k_pages, both.v_pages, both.k, both.v, both.slots, kv_scales=both.scales)
    for name, out, which in (("packed", got, rows), ("from pages", from_pages, own)):
        seen = sees[which]
        yield same(f"attention {about}, {name}, without an infinite value", out[~seen], packed[which][~seen])
        finite = int(torch.isfinite(out[seen]).any(-1).sum())
        said = f"{finite} heads of rows are finite"
        yield Check(f"attention {about}, {name}, with an infinite value", finite == 0, said)


def _with_sinks(dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    lens, dim = _SMALL_LENS[quick], 64
    both = _sequences(dtype, lens, dim)
    plan, sinks = Plan(lens, lens, device=DEVICE), made(_HEADS, dtype=torch.float32, seed=4)
    for window in (128,) if quick else (None, 128):

        def attend(q, k, v, sinks, window=window) -> torch.Tensor:
            return attend_packed(q, k, v, plan, scale=dim**-0.5, sinks=sinks, window=window)

        name = f"attention {dim} {kind(dtype)} with sinks{'' if window is None else ' and a window'}"
        yield from close(name, attend, both.q, both.k, both.v, sinks, tolerance=TOLERANCES[dtype])


def _with_a_block_mask(dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """Values, and the same bits packed and from pages; some queries see nothing."""
    lens, dim = _SMALL_LENS[quick], 64 if quick else 128
    both, blocks = _sequences(dtype, lens, dim), -(-max(lens) // TILE)
    mask = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[-1], mask[-1, 0] = False, not quick
    plan = Plan(lens, lens, device=DEVICE, block_mask=mask)
    name = f"attention {dim} {kind(dtype)} with a block mask"
    yield from close(
        name, lambda q, k, v: attend_packed(q, k, v, plan, scale=dim**-0.5), both.q, both.k, both.v,
        tolerance=TOLERANCES[dtype],
    )  # fmt: skip
    packed = both.packed(block_mask=mask)
    for most in (1, 150):
        own, got = both.last([min(most, length) for length in lens], block_mask=mask)
        yield same(f"{name}, the last {most} from pages", got, packed[own])


def _with_a_prefix(dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """Sequences that go on from the first one's tokens: values, and the bits of whole sequences."""
    first, *rest = _SMALL_LENS[quick]
    shared, lens, dim = first - 3, [first, *rest], 64 if quick else 128
    both = _sequences(dtype, lens, dim)
    contexts = [first, *(length + shared for length in rest)]
    plan = Plan(lens, contexts, prefix_starts=[0] * len(lens), device=DEVICE)
    name = f"attention {dim} {kind(dtype)} with a shared prefix"
    yield from close(
        name, lambda q, k, v: attend_packed(q, k, v, plan, scale=dim**-0.5), both.q, both.k, both.v,
        tolerance=TOLERANCES[dtype],
    )  # fmt: skip
    packed = attend_packed(both.q, both.k, both.v, plan, **both.options)
    for start, length, context in zip(both.starts[1:], rest, contexts[1:]):
        whole = [torch.cat([x[:shared], x[start : start + length]]) for x in (both.q, both.k, both.v)]
        alone = attend_packed(*whole, Plan([context], [context], device=DEVICE), **both.options)
        yield same(f"{name}, a whole sequence of {context}", alone[shared:], packed[start : start + length])


def _pages(
    count: int, heads: int, page: int, dim: int, stored: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, KvScales | None]:
    k, v = (
        torch.zeros(count, heads, page, dim, dtype=FORMATS.get(stored, dtype), device=DEVICE) for _ in "kv"
    )
    return (
        k,
        v,
        None if stored is None else tuple(torch.zeros(count, heads, page, device=DEVICE) for _ in "kv"),
    )


def _one_pass(dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """Heads normed, rotated and written by one kernel and by several."""
    tokens, page = (9, 16) if quick else (1000, 64)
    for heads, kv_heads, dim in (
        ((3, 1, 64),) if quick else ((16, 8, 128), (5, 1, 96), (8, 2, 64), (8, 4, 256))
    ):
        fused = made(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
        q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
        cos, sin, weights = (
            made(n, dim, dtype=dtype, seed=i) for i, n in ((1, tokens), (2, tokens), (3, heads + kv_heads))
        )
        rows = kv_rows(torch.arange(tokens, device=DEVICE), kv_heads, page)
        for stored in (None, *FORMATS):
            ours, theirs = (_pages(-(-tokens // page), kv_heads, page, dim, stored, dtype) for _ in range(2))
            both = rotate(rms_norm(fused[:, : heads + kv_heads], weights, 1e-6), cos, sin)
            write_rows(*theirs[:2], both[:, heads:], v, rows, kv_scales=theirs[2])
            options = {"cos": cos, "sin": sin, "norm_weights": weights, "eps": 1e-6, "kv_scales": ours[2]}
            got = norm_rotate_write(q, k, v, *ours[:2], rows, **options)
            name = f"norm, rotate, write {heads}/{kv_heads} x {dim} {kind(dtype)} as {stored or 'it is'}"
            yield same(f"{name}, q", got, both[:, :heads])
            for part, a, b in zip("kv", ours, theirs):
                yield same(f"{name}, {part}", a.float(), b.float())


def _near_full_precision(quick: bool) -> Iterator[Check]:
    length, heads, kv_heads, dim, page = 100 if quick else 2000, 8, 2, 64 if quick else 128, 64
    q, k, v = (
        made(length, h, dim, dtype=torch.float16, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads))
    )
    k[:, :, 3] += 10.0  # channels that are larger than the others, as models have them
    full = attend_packed(
        q.float(), k.float(), v.float(), Plan([length], [length], device=DEVICE), scale=dim**-0.5
    )
    pages = -(-length // page)
    plan = Plan([length], [length], page_table=torch.arange(pages)[None], page_tokens=page, device=DEVICE)
    for stored, most in (("int8", 0.04), ("fp8", 0.12)):
        k_pages, v_pages, scales = _pages(pages, kv_heads, page, dim, stored, q.dtype)
        write_kv(k_pages, v_pages, k, v, torch.arange(length, device=DEVICE), kv_scales=scales)
        got = attend_paged(q, k_pages, v_pages, plan, scale=dim**-0.5, kv_scales=scales)
        error = float((got - full).norm() / full.norm())
        yield Check(
            f"attention with {stored} pages, near full precision",
            error < most,
            f"{error:.4f}, {most} allowed",
        )


def _decode(
    top: dict[str, float],
    batch: int,
    context: int,
    dim: int,
    heads: int,
    kv_heads: int,
    stored: str | None = None,
    page: int = 64,
) -> Timing:
    num_pages = batch * context // page
    k_pages, v_pages = (made(num_pages, kv_heads, page, dim, seed=i) for i in (1, 2))
    pages, scales = (k_pages, v_pages), None
    if stored is not None:
        (k_read, k_scales), (v_read, v_scales) = (quantised(x, FORMATS[stored]) for x in pages)
        pages, scales = (k_read, v_read), (k_scales, v_scales)
    table = torch.arange(num_pages).view(batch, -1)
    plan = Plan([1] * batch, [context] * batch, page_table=table, page_tokens=page, device=DEVICE)
    q, scale = made(batch, heads, dim), dim**-0.5
    ms = time_ms(lambda: attend_paged(q, *pages, plan, scale=scale, kv_scales=scales))
    k, v = (
        x.view(batch, -1, kv_heads, page, dim).transpose(1, 2).reshape(batch, kv_heads, context, dim)
        for x in (k_pages, v_pages)
    )
    other = time_ms(lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True))
    read = sum(x.nbytes for x in (*pages, *(scales or ())))
    share = read / ms / top["copy"]
    goal = GOALS["decode attention"] if batch >= 32 else None
    shape = f"{batch} x {context}, {heads}/{kv_heads} x {dim}{f', {stored}' if stored else ''}"
    return Timing("decode attention", shape, ms, share, goal, "SDPA, bf16, no pages", other / ms)


def _mixed(
    top: dict[str, float], batch: int, context: int, dim: int, heads: int, kv_heads: int, page: int = 64
) -> Timing:
    """Decoding beside a chunk of a prompt in one step, against the two by themselves."""
    chunk, num_pages = 512, (batch + 1) * context // page
    pages = [made(num_pages, kv_heads, page, dim, seed=i) for i in (1, 2)]
    table, q = torch.arange(num_pages).view(batch + 1, -1), made(batch + chunk, heads, dim)
    queries, contexts = [1] * batch + [chunk], [context] * batch + [2 * chunk]

    def time_of(first: int, end: int, rows: slice) -> float:
        own = slice(first, end)
        plan = Plan(queries[own], contexts[own], page_table=table[own], page_tokens=page, device=DEVICE)
        return time_ms(lambda: attend_paged(q[rows], *pages, plan, scale=dim**-0.5))

    ms = time_of(0, batch + 1, slice(None))
    apart = time_of(0, batch, slice(batch)) + time_of(batch, batch + 1, slice(batch, None))
    share = batch * context * kv_heads * dim * 2 * 2 / ms / top["copy"]
    shape = f"{batch} x {context} and {chunk}, {heads}/{kv_heads} x {dim}"
    return Timing("decode beside a chunk", shape, ms, share, None, "apart", apart / ms)


def _written(
    top: dict[str, float],
    tokens: int,
    dim: int,
    heads: int,
    kv_heads: int,
    stored: str | None,
    page: int = 64,
) -> Timing:
    """Heads normed, rotated and written, against the separate operations."""
    fused = made(tokens, heads + 2 * kv_heads, dim)
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    cos, weights = made(tokens, dim), made(heads + kv_heads, dim)
    rows = kv_rows(torch.arange(tokens, device=DEVICE), kv_heads, page)
    k_pages, v_pages, scales = _pages(-(-tokens // page), kv_heads, page, dim, stored, torch.bfloat16)
    options = {"cos": cos, "sin": cos, "norm_weights": weights, "eps": 1e-6, "kv_scales": scales}

    def separate() -> None:
        both = rotate(rms_norm(fused[:, : heads + kv_heads], weights, 1e-6), cos, cos)
        write_rows(k_pages, v_pages, both[:, heads:], v, rows, kv_scales=scales)

    ms = time_ms(lambda: norm_rotate_write(q, k, v, k_pages, v_pages, rows, **options))
    written = tokens * kv_heads * 2 * (dim * k_pages.element_size() + (4 if scales else 0))
    moved = fused.nbytes + q.numel() * 2 + written + 2 * cos.nbytes
    shape = f"{tokens} x {heads}/{kv_heads} x {dim}{f', {stored}' if stored else ''}"
    goal = _WRITE_GOAL if tokens >= 8192 else None
    return Timing(
        "norm, rotate, write", shape, ms, moved / ms / top["copy"], goal, "separate", time_ms(separate) / ms
    )


def _prefill(top: dict[str, float], length: int, dim: int, heads: int, kv_heads: int) -> Iterator[Timing]:
    q, k, v = (
        made(length, h, dim, seed=i).requires_grad_() for i, h in enumerate((heads, kv_heads, kv_heads))
    )
    a, b, c = (x.detach().transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
    plan, scale = Plan([length], [length], device=DEVICE), dim**-0.5
    work = 2.0 * length * length * heads * dim  # two products, half of each: causal

    def ours() -> torch.Tensor:
        return attend_packed(q, k, v, plan, scale=scale)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)

    def timing(name: str, work: float, run: Callable[[], Any], other: Callable[[], Any]) -> Timing:
        ms = time_ms(run)
        goal = GOALS[name] if length >= 8192 else None
        shape = f"{length}, {heads}/{kv_heads} x {dim}"
        return Timing(name, shape, ms, work / ms / top["matmul"], goal, "SDPA", time_ms(other) / ms)

    with torch.no_grad():
        yield timing("attention forward", work, ours, sdpa)
    mine, theirs = ours(), sdpa()
    yield timing(
        "attention backward",
        2.5 * work,
        lambda: torch.autograd.grad(mine, (q, k, v), mine, retain_graph=True),
        lambda: torch.autograd.grad(theirs, (a, b, c), theirs, retain_graph=True),
    )
