"""Attention on a GPU: packs and their gradients, chunks of pages, decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.measure import DEVICE, TOLERANCES, Check, Timing, close, kind, made, same, time_ms
from rlhf.kernels import attention_triton
from rlhf.kernels.attention import Plan, attend_packed, attend_paged, write_kv

GOALS = {"decode attention": 0.85, "attention forward": 0.60, "attention backward": 0.45}  # on an H200


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    for dim in (64, 128, 256):
        yield from _calls(dtype, dim)


def checks(quick: bool) -> Iterator[Check]:
    for dtype, tolerance in TOLERANCES.items():
        if (
            DEVICE != "cpu" or dtype != torch.bfloat16
        ):  # the interpreter multiplies the 16 bits of bf16 as they are
            yield from _values(dtype, tolerance, quick)
    for dtype in (torch.bfloat16, torch.float32):
        yield from _bits(dtype, quick)


def timings(top: dict[str, float]) -> Iterator[Timing]:
    for dim, heads, kv_heads in ((128, 32, 8), (128, 16, 8), (64, 32, 8)):
        for batch, context in ((32, 1024), (32, 8192), (128, 2048), (1, 8192)):
            yield _decode(top, batch, context, dim, heads, kv_heads)
        for length in (2048, 8192):
            yield from _prefill(top, length, dim, heads, kv_heads)


def _calls(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    q, k = (torch.zeros(1000, heads, dim, dtype=dtype) for heads in (8, 2))
    pages, table = torch.zeros(40, 2, 64, dim, dtype=dtype), torch.arange(40)[:22].view(2, 11)
    options = {"scale": 0.1, "window": None, "softcap": None, "sinks": None}
    pack, chunks, decode = (
        Plan([700, 300], [700, 300]),
        Plan([300, 20], [700, 300], page_table=table, page_tokens=64),
        Plan([1, 1], [700, 300], page_table=table, page_tokens=64),
    )
    logs = torch.zeros(1000, 8)
    forward = functools.partial(attention_triton.forward, share_out=True)
    yield f"attention {dim}", lambda: forward(q, k, k, pack, **options)
    yield (
        f"attention backward {dim}",
        lambda: attention_triton.gradients(q, k, k, q, logs, q, pack, **options),
    )
    yield f"attention, chunks of pages {dim}", lambda: forward(q[:320], pages, pages, chunks, **options)
    yield f"attention, decode {dim}", lambda: forward(q[:2], pages, pages, decode, **options)


def _values(dtype: torch.dtype, tolerance: float, quick: bool) -> Iterator[Check]:
    lens = [5, 40] if quick else [5, 700, 1, 300, 64]
    options: list[dict[str, Any]] = (
        [{}, {"window": 20}] if quick else [{}, {"window": 100}, {"softcap": 20.0}]
    )
    for dim in (64,) if quick else (64, 96, 128, 256):
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


def _bits(dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """Packed, in chunks from pages, and token after token: the same numbers."""
    lens = [20, 300] if quick else [17, 300, 1025, 700]
    heads, kv_heads, dim, page = 8, 2, 64 if quick else 128, 64
    scale, n = dim**-0.5, sum(lens)
    q, k, v = (made(n, h, dim, dtype=dtype, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    packed = attend_packed(q, k, v, Plan(lens, lens, device=DEVICE), scale=scale)
    pages_each = -(-max(lens) // page)
    table = torch.randperm(pages_each * len(lens), generator=torch.Generator().manual_seed(3)).view(
        len(lens), -1
    )
    k_pages, v_pages = (
        torch.zeros(table.numel(), kv_heads, page, dim, dtype=dtype, device=DEVICE) for _ in "kv"
    )
    starts = [sum(lens[:i]) for i in range(len(lens))]
    slots = torch.cat(
        [
            table[s, torch.arange(length) // page] * page + torch.arange(length) % page
            for s, length in enumerate(lens)
        ]
    )
    write_kv(k_pages, v_pages, k, v, slots.to(DEVICE))
    for alone, (start, length) in enumerate(zip(starts, lens)):
        own = slice(start, start + length)
        got = attend_packed(q[own], k[own], v[own], Plan([length], [length], device=DEVICE), scale=scale)
        yield same(f"attention {kind(dtype)}, sequence {alone} alone", got, packed[own])
    for chunk in (300,) if quick else (1, 2, 64, 100, 300):
        # the last `chunk` tokens of every sequence
        counts = [min(chunk, length) for length in lens]
        plan = Plan(counts, lens, page_table=table, page_tokens=page, device=DEVICE)
        own = torch.cat(
            [torch.arange(s + length - c, s + length) for s, length, c in zip(starts, lens, counts)]
        ).to(DEVICE)
        got = attend_paged(q[own], k_pages, v_pages, plan, scale=scale)
        yield same(f"attention {kind(dtype)}, the last {chunk} from pages", got, packed[own])


def _decode(
    top: dict[str, float], batch: int, context: int, dim: int, heads: int, kv_heads: int, page: int = 64
) -> Timing:
    num_pages = batch * context // page
    k_pages, v_pages = (made(num_pages, kv_heads, page, dim, seed=i) for i in (1, 2))
    table = torch.arange(num_pages).view(batch, -1)
    plan = Plan([1] * batch, [context] * batch, page_table=table, page_tokens=page, device=DEVICE)
    q, scale = made(batch, heads, dim), dim**-0.5
    ms = time_ms(lambda: attend_paged(q, k_pages, v_pages, plan, scale=scale))
    k, v = (
        x.view(batch, -1, kv_heads, page, dim).transpose(1, 2).reshape(batch, kv_heads, context, dim)
        for x in (k_pages, v_pages)
    )
    other = time_ms(lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True))
    share = 2 * k_pages.nbytes / ms / top["copy"]
    goal = GOALS["decode attention"] if batch >= 32 else None
    shape = f"{batch} x {context}, {heads}/{kv_heads} x {dim}"
    return Timing("decode attention", shape, ms, share, goal, "SDPA, no pages", other / ms)


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
