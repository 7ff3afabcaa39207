"""Causal attention as Triton kernels: packs and pages, decode and prefill in the same bits, and the backward of packs.

A context is cut into segments of 512 absolute positions. Each is reduced by itself to a maximum, a sum and a weighted sum
of values, and segments are merged in their order by one formula: in a program's registers where it walks the whole
context, in `_join` where programs took a segment each: sequences of few queries, which fill no GPU otherwise, also beside
longer ones in a plan. A tile that a row does not see changes nothing of it, exactly, whatever is in it: values that are not
finite are taken out of tiles that some rows see less of than others. What a block mask hides is in no program's work. The
backward recomputes probabilities from each row's logarithm of the sum (Dao 2023, arXiv 2307.08691); every gradient is added
up by one program, in one order.

Rows of a tile are queries x the heads that share a key head; prefill's tiles have twice the rows and twice the warps of
decode's, so that a warp's rows, its instructions and their order are the same. Fusing of products and sums is left to no
compiler in the forward, which is compiled several times and must round alike. Pages in int8 or fp8 meet q as they are: their
scales go onto scores and probabilities, and in fp32 onto the numbers. Not here: what goes together
(`rlhf.kernels.attention.Plan`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import triton
import triton.language as tl

from rlhf.kernels.attention import TILE, Plan, counted
from rlhf.kernels.gpu import launch, row_tile, token_step

SEGMENT = 512
_STAGES = 3
_BACKWARD_WARPS, _BACKWARD_STAGES = 8, 2
_FEW_QUERIES = 8  # of a sequence: then segments are shared out
_NATIVE_FP8 = (8, 9)  # the first GPUs that convert e4m3; others take its bits apart
_LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))


# -- in all kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _merged(m, total, acc, m_more, total_more, acc_more):
    # two parts of a row's softmax (maximum, sum, values), base 2; -inf where a part has no key
    top = tl.maximum(m, m_more)
    safe = tl.where(top == float("-inf"), 0.0, top)
    old, new = tl.exp2(m - safe), tl.exp2(m_more - safe)
    total = tl.fma(total, old, total_more * new)
    acc = tl.fma(acc, old[:, None] + tl.zeros_like(acc), acc_more * new[:, None])
    return top, total, acc


@triton.jit
def _finished(m, total, acc, sinks, head, valid, SINKS: tl.constexpr):
    # the row's output, and the base 2 logarithm of its sum, the sink in it
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * _LOG2E
        m, total, acc = _merged(m, total, acc, sink, tl.full(m.shape, 1.0, tl.float32), tl.zeros_like(acc))
    some = valid & (total != 0.0)  # a row that sees nothing has 0
    total = tl.where(some, total, 1.0)
    return acc / total[:, None], tl.where(some, m, 0.0) + tl.log2(total)


@triton.jit
def _rows_of(item, GROUP: tl.constexpr, ROWS: tl.constexpr):
    # of a program's tile: token, head, position, whether it is one at all
    token, count, position = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    row = tl.arange(0, ROWS)
    query = row // GROUP
    head = tl.program_id(1) * GROUP + row % GROUP
    return (token + query).to(tl.int64), head, position + query, query < count


@triton.jit
def _sees(at, position, window, WINDOW: tl.constexpr):
    # whether the query at a position sees the key at another
    sees = at <= position
    if WINDOW:
        sees &= at > position - window
    return sees


@triton.jit
def _key_row(
    first, inside, seq, page_table, table_width, kv_heads, kv_head, PAGED: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    # where a tile's keys lie: rows of a key head's pages, or tokens
    position = first + tl.arange(0, KEYS)
    if PAGED:
        pages = page_table + tl.load(seq + 4).to(tl.int64) * table_width
        if PAGE % KEYS == 0:
            page = tl.load(pages + first // PAGE).to(tl.int64)
            return (page * kv_heads + kv_head) * PAGE + first % PAGE + tl.arange(0, KEYS)
        page = tl.load(pages + position // PAGE, mask=inside, other=0).to(tl.int64)
        return (page * kv_heads + kv_head) * PAGE + position % PAGE
    own_start, own_from, prefix = tl.load(seq), tl.load(seq + 1), tl.load(seq + 2)
    return tl.where(position < own_from, prefix + position, own_start + position - own_from).to(tl.int64)


@triton.jit
def _numbers(x, like: tl.constexpr):
    # numbers of a tile in another dtype; bytes are fp8, e4m3
    if x.dtype == tl.uint8:
        bits = x.to(tl.int16)
        bits = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)  # the exponent's bias is 7 there, 15 here
        return (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(like)
    return x.to(like)


@triton.jit
def _scores(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    # of rows a and keys b (transposed), base 2; and the slope of the cap
    s = tl.dot(a, b, input_precision="ieee")
    slope = tl.full(s.shape, 1.0, tl.float32)
    if SOFTCAP:
        s = s * scale
        e = tl.exp2(tl.abs(s / softcap) * (-2.0 * _LOG2E))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(s < 0, -t, t)
        s = softcap * t * _LOG2E
        slope = 1.0 - t * t
    else:
        s = s * (scale * _LOG2E)
    return s, slope


@triton.jit
def _tile(
    m, total, acc, q, position, first, end, k, v, k_scales, v_scales, seq, page_table, table_width, k_token, v_token,
    kv_heads, kv_head, dim, v_dim, scale, softcap, window, PAGED: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, ALL: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr,
):  # fmt: skip
    # a part's (maximum, sum, values) with one more tile of keys; ALL: every row sees every key of it
    d, dv = tl.arange(0, DIM), tl.arange(0, V_DIM)
    at = first + tl.arange(0, KEYS)
    there = at < end
    row = _key_row(first, there, seq, page_table, table_width, kv_heads, kv_head, PAGED, PAGE, KEYS)
    k_at, v_at = row * dim, row * v_dim
    if not PAGED:
        k_at, v_at = row * k_token + kv_head * dim, row * v_token + kv_head * v_dim
    k_inside, v_inside = (d < dim)[:, None], (dv < v_dim)[None, :]
    if not ALL:
        k_inside, v_inside = k_inside & there[None, :], v_inside & there[:, None]
    kt = tl.load(k + k_at[None, :] + d[:, None], mask=k_inside, other=0.0)
    of_key = scale
    if SCALED:
        k_scale, v_scale = (
            tl.load(k_scales + row, mask=there, other=0.0),
            tl.load(v_scales + row, mask=there, other=0.0),
        )
        kt = _numbers(kt, q.dtype)
        if q.dtype == tl.float32:
            kt = kt * k_scale[None, :]
        else:
            of_key = scale * k_scale[None, :]
    s, _ = _scores(q, kt, of_key, softcap, SOFTCAP)
    if not ALL:
        last = tl.minimum(position, end - 1)
        seen = at[None, :] <= last[:, None]
        if WINDOW:
            seen &= at[None, :] > (position - window)[:, None]
        s = tl.where(seen, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - safe[:, None])
    old = tl.exp2(m - safe)
    total = tl.fma(total, old, tl.sum(p, 1))
    values = tl.load(v + v_at[:, None] + dv[None, :], mask=v_inside, other=0.0)
    if not ALL:
        # 0 times a value that is not finite is no 0: it is taken out, and the sum of every row that sees it made NaN
        if SCALED:
            wrong = tl.where(tl.abs(v_scale) < _INF, 0, 1)
            v_scale = tl.where(wrong == 0, v_scale, 0.0)
        else:
            finite = tl.abs(values) < _INF
            wrong = tl.max(tl.where(finite, 0, 1), 1)
            values = tl.where(finite, values, tl.zeros_like(values))
        if WINDOW == 1:  # it may lie between two
            sees_wrong = tl.max(tl.where(seen, wrong[None, :], 0), 1) > 0
        else:
            sees_wrong = tl.min(tl.where(wrong > 0, at, end), 0) <= last
            if WINDOW:
                sees_wrong &= tl.max(tl.where(wrong > 0, at, -1), 0) > position - window
        total = tl.where(sees_wrong, float("nan"), total)
    if SCALED:
        if q.dtype == tl.float32:
            values = _numbers(values, tl.float32) * v_scale[:, None]
        else:  # a small scale is nothing in fp16
            values = _numbers(values, tl.bfloat16)
            p = p * v_scale[None, :]
    acc = tl.dot(p.to(values.dtype), values, acc * old[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def _segment(
    q, low, position, start, end, k, v, k_scales, v_scales, seq, page_table, table_width, k_token, v_token, kv_heads,
    kv_head, dim, v_dim, scale, softcap, window, PAGED: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr,
):  # fmt: skip
    # positions start to end of a context, of which the rows see those up to their own, `low` or more: (maximum, sum, values)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V_DIM), tl.float32)
    rest = start
    if not WINDOW:
        rest = start + tl.maximum(tl.minimum(end, low + 1) - start, 0) // KEYS * KEYS
        for first in range(start, rest, KEYS):
            m, total, acc = _tile(
                m, total, acc, q, position, first, end, k, v, k_scales, v_scales, seq, page_table, table_width,
                k_token, v_token, kv_heads, kv_head, dim, v_dim, scale, softcap, window, PAGED, PAGE, SCALED, SOFTCAP,
                WINDOW, True, KEYS, DIM, V_DIM,
            )  # fmt: skip
    for first in range(rest, end, KEYS):
        m, total, acc = _tile(
            m, total, acc, q, position, first, end, k, v, k_scales, v_scales, seq, page_table, table_width, k_token,
            v_token, kv_heads, kv_head, dim, v_dim, scale, softcap, window, PAGED, PAGE, SCALED, SOFTCAP, WINDOW, False,
            KEYS, DIM, V_DIM,
        )  # fmt: skip
    return m, total, acc


# -- forward ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["table_width", "part_rows"])
def _forward(
    q, k, v, k_scales, v_scales, out, logs, sinks, items, seqs, ranges, page_table, part_acc, part_m, part_total,
    table_width, part_rows, q_token, k_token, v_token, heads, kv_heads, dim, v_dim, scale, softcap, window,
    PAGED: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, LISTED: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) * 8
    kv_head = tl.program_id(1)
    token, head, position, valid = _rows_of(item, GROUP, ROWS)
    low = tl.load(item + 2)
    seq = seqs + tl.load(item + 3) * 8
    first, end = tl.load(item + 4), tl.load(item + 5)
    d, dv = tl.arange(0, DIM), tl.arange(0, V_DIM)
    q_at = token * q_token + head * dim
    a = tl.load(q + q_at[:, None] + d[None, :], mask=valid[:, None] & (d < dim)[None, :], other=0.0)
    if SPLIT:
        m, total, acc = _segment(
            a, low, position, first, end, k, v, k_scales, v_scales, seq, page_table, table_width, k_token, v_token,
            kv_heads, kv_head, dim, v_dim, scale, softcap, window, PAGED, PAGE, SCALED, SOFTCAP, WINDOW, ROWS, KEYS, DIM,
            V_DIM,
        )  # fmt: skip
    else:
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, V_DIM), tl.float32)
        number = (end - first) if LISTED else tl.cdiv(end - first, SEGMENT)
        for n in range(number):
            if LISTED:
                start = tl.load(ranges + (first + n) * 2)
                stop = tl.minimum(tl.load(ranges + (first + n) * 2 + 1), low + tl.load(item + 1))
            else:
                start = first + n * SEGMENT
                stop = tl.minimum(start + SEGMENT, end)
            m_one, total_one, acc_one = _segment(
                a, low, position, start, stop, k, v, k_scales, v_scales, seq, page_table, table_width, k_token,
                v_token, kv_heads, kv_head, dim, v_dim, scale, softcap, window, PAGED, PAGE, SCALED, SOFTCAP, WINDOW, ROWS,
                KEYS, DIM, V_DIM,
            )  # fmt: skip
            m, total, acc = _merged(m, total, acc, m_one, total_one, acc_one)
    inside = valid[:, None] & (dv < v_dim)[None, :]
    if SPLIT:
        part = (tl.load(item + 6).to(tl.int64) * kv_heads + kv_head) * part_rows + tl.arange(0, ROWS)
        tl.store(part_m + part, m, mask=valid)
        tl.store(part_total + part, total, mask=valid)
        tl.store(part_acc + part[:, None] * v_dim + dv[None, :], acc, mask=inside)
    else:
        result, log = _finished(m, total, acc, sinks, head, valid, SINKS)
        out_at = (token * heads + head) * v_dim
        tl.store(out + out_at[:, None] + dv[None, :], result.to(out.dtype.element_ty), mask=inside)
        tl.store(logs + token * heads + head, log, mask=valid)


@triton.jit(do_not_specialize=["part_rows"])
def _join(
    out, sinks, items, part_acc, part_m, part_total, part_rows, heads, kv_heads, v_dim,
    SINKS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) * 8
    kv_head = tl.program_id(1)
    token, head, _, valid = _rows_of(item, GROUP, ROWS)
    dv = tl.arange(0, V_DIM)
    inside = valid[:, None] & (dv < v_dim)[None, :]
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V_DIM), tl.float32)
    for number in range(tl.load(item + 6), tl.load(item + 7)):
        part = (number * kv_heads + kv_head).to(tl.int64) * part_rows + tl.arange(0, ROWS)
        m_one = tl.load(part_m + part, mask=valid, other=float("-inf"))
        total_one = tl.load(part_total + part, mask=valid, other=0.0)
        acc_one = tl.load(part_acc + part[:, None] * v_dim + dv[None, :], mask=inside, other=0.0)
        m, total, acc = _merged(m, total, acc, m_one, total_one, acc_one)
    result, _ = _finished(m, total, acc, sinks, head, valid, SINKS)
    out_at = (token * heads + head) * v_dim
    tl.store(out + out_at[:, None] + dv[None, :], result.to(out.dtype.element_ty), mask=inside)


# -- backward --------------------------------------------------------------------------------------------------------------


@triton.jit
def _grad_q(
    q, k, v, grad, logs, delta, grad_q, items, seqs, ranges, q_token, k_token, v_token, heads, kv_heads, dim, v_dim,
    scale, softcap, window,
    LISTED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) * 8
    kv_head = tl.program_id(1)
    token, head, position, valid = _rows_of(item, GROUP, ROWS)
    seq = seqs + tl.load(item + 3) * 8
    first, end = tl.load(item + 4), tl.load(item + 5)
    d, dv = tl.arange(0, DIM), tl.arange(0, V_DIM)
    q_inside, v_inside = valid[:, None] & (d < dim)[None, :], valid[:, None] & (dv < v_dim)[None, :]
    a = tl.load(q + (token * q_token + head * dim)[:, None] + d[None, :], mask=q_inside, other=0.0)
    g = tl.load(grad + ((token * heads + head) * v_dim)[:, None] + dv[None, :], mask=v_inside, other=0.0)
    log = tl.load(logs + token * heads + head, mask=valid, other=0.0)
    less = tl.load(delta + token * heads + head, mask=valid, other=0.0)
    total = tl.zeros((ROWS, DIM), tl.float32)
    for n in range((end - first) if LISTED else 1):
        begin, stop = first, end
        if LISTED:
            begin = tl.load(ranges + (first + n) * 2)
            stop = tl.minimum(tl.load(ranges + (first + n) * 2 + 1), tl.load(item + 2) + tl.load(item + 1))
        for start in range(begin, stop, KEYS):
            at = start + tl.arange(0, KEYS)
            there = at < stop
            row = _key_row(start, there, seq, seq, 0, kv_heads, kv_head, False, 1, KEYS)
            k_at, v_at = row * k_token + kv_head * dim, row * v_token + kv_head * v_dim
            kt = tl.load(k + k_at[None, :] + d[:, None], mask=there[None, :] & (d < dim)[:, None], other=0.0)
            vt = tl.load(
                v + v_at[None, :] + dv[:, None], mask=there[None, :] & (dv < v_dim)[:, None], other=0.0
            )
            s, slope = _scores(a, kt, scale, softcap, SOFTCAP)
            seen = there[None, :] & valid[:, None] & _sees(at[None, :], position[:, None], window, WINDOW)
            p = tl.where(seen, tl.exp2(s - log[:, None]), 0.0)
            ds = p * (tl.dot(g, vt, input_precision="ieee") - less[:, None]) * slope
            total = tl.dot(ds.to(kt.dtype), tl.trans(kt), total, input_precision="ieee")
    at = (token * heads + head) * dim
    tl.store(grad_q + at[:, None] + d[None, :], (total * scale).to(grad_q.dtype.element_ty), mask=q_inside)


@triton.jit
def _grad_kv(
    q, k, v, grad, logs, delta, grad_k, grad_v, blocks, readers, seqs, q_token, k_token, v_token, heads, kv_heads,
    dim, v_dim, scale, softcap, window,
    OF_K: tl.constexpr, OF_V: tl.constexpr, LISTED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    block = blocks + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    key = tl.load(block) + tl.arange(0, KEYS)  # a token
    there = tl.arange(0, KEYS) < tl.load(block + 1)
    d, dv = tl.arange(0, DIM), tl.arange(0, V_DIM)
    k_inside, v_inside = there[:, None] & (d < dim)[None, :], there[:, None] & (dv < v_dim)[None, :]
    key_row = key.to(tl.int64)
    b = tl.load(k + (key_row * k_token + kv_head * dim)[:, None] + d[None, :], mask=k_inside, other=0.0)
    c = tl.load(v + (key_row * v_token + kv_head * v_dim)[:, None] + dv[None, :], mask=v_inside, other=0.0)
    total_k = tl.zeros((KEYS, DIM), tl.float32)
    total_v = tl.zeros((KEYS, V_DIM), tl.float32)
    READER: tl.constexpr = 3 if LISTED else 1  # then with the first of its queries and the one after the last
    for reader in range(tl.load(block + 2), tl.load(block + 3)):
        seq = seqs + tl.load(readers + reader * READER) * 8
        own_start, own_from, prefix, context = (
            tl.load(seq),
            tl.load(seq + 1),
            tl.load(seq + 2),
            tl.load(seq + 3),
        )
        is_own = tl.load(block) >= own_start
        at = tl.where(is_own, key - own_start + own_from, key - prefix)
        seen_key = there & (is_own | ((at >= 0) & (at < own_from)))
        lowest = tl.maximum(tl.where(is_own, tl.load(block) - own_start, 0), 0)
        highest = context - own_from
        if WINDOW:
            last_at = (
                tl.where(is_own, tl.load(block) - own_start + own_from, tl.load(block) - prefix) + KEYS - 1
            )
            highest = tl.minimum(highest, last_at + window - own_from)
        if LISTED:
            lowest = tl.maximum(lowest, tl.load(readers + reader * READER + 1))
            highest = tl.minimum(highest, tl.load(readers + reader * READER + 2))
        for start in range(lowest * GROUP, highest * GROUP, ROWS):
            row = start + tl.arange(0, ROWS)
            query = row // GROUP
            valid = query < highest
            position = own_from + query
            token = (own_start + query).to(tl.int64)
            head = kv_head * GROUP + row % GROUP
            a = tl.load(
                q + (token * q_token + head * dim)[:, None] + d[None, :],
                mask=valid[:, None] & (d < dim)[None, :], other=0.0,
            )  # fmt: skip
            g = tl.load(
                grad + ((token * heads + head) * v_dim)[:, None] + dv[None, :],
                mask=valid[:, None] & (dv < v_dim)[None, :], other=0.0,
            )  # fmt: skip
            log = tl.load(logs + token * heads + head, mask=valid, other=0.0)
            less = tl.load(delta + token * heads + head, mask=valid, other=0.0)
            s, slope = _scores(b, tl.trans(a), scale, softcap, SOFTCAP)
            seen = seen_key[:, None] & valid[None, :] & _sees(at[:, None], position[None, :], window, WINDOW)
            p = tl.where(seen, tl.exp2(s - log[None, :]), 0.0)
            if OF_V:
                total_v = tl.dot(p.to(g.dtype), g, total_v, input_precision="ieee")
            if OF_K:
                ds = p * (tl.dot(c, tl.trans(g), input_precision="ieee") - less[None, :]) * slope
                total_k = tl.dot(ds.to(a.dtype), a, total_k, input_precision="ieee")
    k_to, v_to = (key_row * kv_heads + kv_head) * dim, (key_row * kv_heads + kv_head) * v_dim
    if OF_K:
        tl.store(
            grad_k + k_to[:, None] + d[None, :], (total_k * scale).to(grad_k.dtype.element_ty), mask=k_inside
        )
    if OF_V:
        tl.store(grad_v + v_to[:, None] + dv[None, :], total_v.to(grad_v.dtype.element_ty), mask=v_inside)


@triton.jit(do_not_specialize=["count"])
def _row_products(a, b, out, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[r] = sum of a[r] b[r], fp32; a row has `width` numbers and begins where the one before ends."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = row[:, None].to(tl.int64) * width + column[None, :]
    inside = (row < count)[:, None] & (column < width)[None, :]
    x, y = (tl.load(a + at, mask=inside, other=0.0), tl.load(b + at, mask=inside, other=0.0))
    tl.store(out + row, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), mask=row < count)


# -- what the programs do --------------------------------------------------------------------------------------------------


# of a plan's sequences: those of at most _FEW_QUERIES queries, the others
Members = Literal["all", "few", "many"]


@dataclass(frozen=True)
class Work:
    """Queries of a plan cut into programs, int32 on the device.

    items (n, 8): token, queries, position, sequence, first key, end of keys, first part, end of parts. shares (parts, 8): the
    same for one segment each; None = an item walks its context alone. ranges (g, 2): first key and end, each in one segment;
    then items' keys are numbers of these.
    """

    items: torch.Tensor
    shares: torch.Tensor | None
    ranges: torch.Tensor | None


@dataclass(frozen=True)
class KeyWork:
    """The keys of a pack cut into programs, int32 on the device.

    blocks (b, 4): token, keys, first reader, end of readers. readers (r,): sequences that read a block's keys; with a block
    mask (r, 3): and which queries.
    """

    blocks: torch.Tensor
    readers: torch.Tensor


@dataclass(frozen=True)
class Tile:
    """Rows and keys that a program works on together, and the powers of 2 that hold a head."""

    rows: int
    keys: int
    dim: int
    v_dim: int
    warps: int


@functools.cache
def tile_of(dtype: torch.dtype, dim: int, v_dim: int, group: int, *, many: bool = False) -> Tile:
    """A function of dtype and sizes alone, so that a row's bits are the same in every call. `many` rows: the same for each
    warp, and twice the warps. fp32 is not for tensor cores, and its tiles are small for it."""
    dim, v_dim = (triton.next_power_of_2(max(size, 16)) for size in (dim, v_dim))
    wide = max(dim, v_dim) > 128
    rows, keys, warps = (16, 16, 8) if dtype == torch.float32 else (64, 32, 8) if wide else (64, 64, 4)
    if many and warps == 4:
        rows, warps = 2 * rows, 2 * warps
    return Tile(max(rows, triton.next_power_of_2(group)), keys, dim, v_dim, warps)


def backward_tiles(dtype: torch.dtype, dim: int, v_dim: int, group: int) -> tuple[Tile, Tile]:
    """For gradients of queries, and of keys and values: functions of dtype and sizes alone. Hopper's products want 64 keys
    or queries at least; wide heads' sums over so many keys leave room for few queries."""
    tile = replace(tile_of(dtype, dim, v_dim, group), warps=_BACKWARD_WARPS)
    return tile, replace(tile, rows=32, keys=64) if _is_wide(dtype, tile) else tile


def _is_wide(dtype: torch.dtype, tile: Tile) -> bool:
    return dtype != torch.float32 and max(tile.dim, tile.v_dim) > 128


class DecodePlan(Plan):
    """One query for each of S sequences, of contexts of up to `pages` pages, whose numbers `fill` writes to where they were
    on the device: what a CUDA graph is recorded with. A sequence's bits are those of a plan of its own."""

    def __init__(self, sequences: int, pages: int, page_tokens: int, device: torch.device) -> None:
        tokens = pages * page_tokens
        table = np.zeros((sequences, pages), np.int64)
        super().__init__(
            [1] * sequences, [tokens] * sequences, page_table=table, page_tokens=page_tokens, device=device
        )
        self.shared = tokens > SEGMENT
        self._of_window: list[tuple[tuple[int, int | None], Work]] = []
        self._sequences = tuple(self._zeros(sequences, width) for width in (8, pages))
        self.made["triton sequences"] = self._sequences

    def work(self, queries: int, window: int | None) -> Work:
        """Room for the work of any contexts; it says nothing to do until the next `fill`."""
        for key, work in self._of_window:
            if key == (queries, window):
                return work
        tokens, count = self.page_table.shape[1] * self.page_tokens, len(self.query_lens)
        parts = -(-tokens // SEGMENT)
        if window is not None:
            parts = min(parts, -(-window // SEGMENT) + 1)
        work = Work(self._zeros(count, 8), self._zeros(count * parts, 8) if self.shared else None, None)
        self._of_window.append(((queries, window), work))
        return work

    def fill(self, context_lens: np.ndarray, page_table: np.ndarray) -> None:
        """Contexts (S,) and pages (S, at most `pages`) of the next run. Raises ValueError for what does not fit."""
        count, most = self.page_table.shape
        if len(context_lens) != count or page_table.shape[1] > most:
            raise ValueError(
                f"contexts {context_lens.shape} in pages {page_table.shape} for a plan of {count} sequences and {most} pages"
            )
        now = Plan([1] * count, context_lens, page_table=page_table, page_tokens=self.page_tokens)
        seqs, table = _sequence_numbers(now)
        self._sequences[0].copy_(_pinned(seqs, self.device), non_blocking=True)
        self._sequences[1][:, : table.shape[1]].copy_(_pinned(table, self.device), non_blocking=True)
        for (queries, window), work in self._of_window:
            items, shares, _ = _work_numbers(now, queries, window, "all", self.shared)
            work.items.copy_(_pinned(items, self.device), non_blocking=True)
            if work.shares is not None and shares is not None:
                room = np.zeros(tuple(work.shares.shape), np.int64)  # no queries
                room[: len(shares)] = shares
                work.shares.copy_(_pinned(room, self.device), non_blocking=True)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)


def _pinned(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """int32 in memory that a GPU can copy from by itself."""
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
    return x.pin_memory() if device.type == "cuda" else x


def work_of(
    plan: Plan, group: int, window: int | None, tile: Tile, members: Members = "all", *, shared: bool = False
) -> Work:
    """The work of some of a plan's sequences, made once for all layers; `shared`: a segment a program."""
    if isinstance(plan, DecodePlan):
        return plan.work(tile.rows // group, window)
    key = ("triton", group, window, tile.rows, members, shared)
    if key not in plan.made:
        numbers = _work_numbers(plan, tile.rows // group, window, members, shared)
        plan.made[key] = Work(*(None if x is None else _int32(x, plan) for x in numbers))
    return plan.made[key]


def shares_of(plan: Plan, window: int | None) -> list[tuple[Members, bool]]:
    """Which sequences are worked on together, and whether programs take a segment each. Those of few queries and a long
    context cannot fill a GPU otherwise, whatever else is in the plan. Found once for all layers."""
    if isinstance(plan, DecodePlan):
        return [("all", plan.shared)]
    key = ("triton shares", window)
    if key not in plan.made:
        plan.made[key] = _find_shares(plan, window)
    return plan.made[key]


def _find_shares(plan: Plan, window: int | None) -> list[tuple[Members, bool]]:
    few = _few(plan)
    start = 0 if window is None else np.maximum(plan.context_lens - plan.query_lens - window + 1, 0)
    long = plan.context_lens > start // SEGMENT * SEGMENT + SEGMENT
    if not (few & long).any():
        return [("all", False)]
    return [("all", True)] if few.all() else [("few", True), ("many", False)]


def _few(plan: Plan) -> np.ndarray:
    return plan.query_lens <= _FEW_QUERIES


def _work_numbers(
    plan: Plan, queries: int, window: int | None, members: Members, shared: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """As `Work` has them."""
    before = plan.context_lens - plan.query_lens
    seq, first, count = plan.pieces(queries)
    if members != "all":
        own = _few(plan)[seq] == (members == "few")
        seq, first, count = seq[own], first[own], count[own]
    position = before[seq] + first
    key_from = (
        np.zeros_like(seq) if window is None else np.maximum(position - window + 1, 0) // SEGMENT * SEGMENT
    )
    key_end, ranges = position + count, None
    if plan.block_mask is None:
        parts = -(-(key_end - key_from) // SEGMENT)
        which, number = counted(parts)
        starts = key_from[which] + number * SEGMENT
        stops = np.minimum(starts + SEGMENT, key_end[which])
    else:
        found = [_ranges(plan, *item) for item in zip(seq, position, key_from, key_end)]
        parts = np.asarray([len(r) for r in found], np.int64)
        which, number = counted(parts)
        starts, stops = np.concatenate([*found, np.zeros((0, 2), np.int64)]).T
    ends = np.cumsum(parts)
    items = np.stack(
        [plan.starts[seq] + first, count, position, seq, key_from, key_end, ends - parts, ends], 1
    )
    shares = None
    if shared:
        shares = items[which]
        shares[:, 4], shares[:, 5], shares[:, 6] = starts, stops, np.arange(len(which))
    elif plan.block_mask is not None:
        items[:, 4:6], ranges = items[:, 6:8], np.stack([starts, stops], 1)
    if not shared:
        items = items[np.argsort(key_from - key_end, kind="stable")]  # the longest first
    return items, shares, ranges


def _sequences(plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, 8): first query, its position, prefix, context, row of the page table; and the table (S, pages)."""
    if "triton sequences" not in plan.made:
        seqs, table = _sequence_numbers(plan)
        plan.made["triton sequences"] = _int32(seqs, plan), _int32(table, plan)
    return plan.made["triton sequences"]


def _sequence_numbers(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    zeros = np.zeros(len(plan.query_lens), np.int64)
    prefix = zeros if plan.prefix_starts is None else plan.prefix_starts
    before = plan.context_lens - plan.query_lens
    own = (plan.starts, before, prefix, plan.context_lens, np.arange(len(zeros)), zeros, zeros, zeros)
    return np.stack(own, 1), np.zeros((1, 1), np.int64) if plan.page_table is None else plan.page_table


def key_work_of(plan: Plan, keys: int) -> KeyWork:
    """The keys of a pack in blocks of so many, made once for all layers."""
    key = ("triton keys", keys)
    if key not in plan.made:
        plan.made[key] = KeyWork(*(_int32(x, plan) for x in _key_blocks(plan, keys)))
    return plan.made[key]


def _int32(array: np.ndarray, plan: Plan) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(plan.device)


def _ranges(plan: Plan, seq: int, position: int, key_from: int, key_end: int) -> np.ndarray:
    """(n, 2) first key and end of the parts of segments that the block mask leaves to a query."""
    tiles = plan.visible_tiles(seq, position, key_from, key_end) * TILE
    new = np.diff(tiles, prepend=-SEGMENT) > TILE
    new |= tiles % SEGMENT == 0
    starts = tiles[new]
    stops = np.append(tiles[np.flatnonzero(new)[1:] - 1], tiles[-1:])[: len(starts)] + TILE
    return np.stack([starts, np.minimum(stops, key_end)], 1)


def _key_blocks(plan: Plan, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's own keys in blocks, and for each block the sequences that read it, its own first; with a block mask
    (sequence, first query, end of queries) of those that do."""
    readers_of: list[list[Any]] = [[s] for s in range(len(plan.starts))]
    if plan.prefix_starts is not None:
        before = plan.context_lens - plan.query_lens
        for s in np.flatnonzero(before):
            first = np.searchsorted(plan.starts, plan.prefix_starts[s], side="right") - 1
            last = np.searchsorted(plan.starts, plan.prefix_starts[s] + before[s] - 1, side="right") - 1
            for owner in range(first, last + 1):
                readers_of[owner].append(int(s))
    step = keys if plan.block_mask is None else plan.block
    blocks, readers = [], []
    for s, (start, length) in enumerate(zip(plan.starts, plan.query_lens)):
        begin = len(readers)
        readers += readers_of[s] if plan.block_mask is None else []
        for part in range(0, length, max(step, 1)):
            if plan.block_mask is not None:
                begin = len(readers)
                readers += [(s, *r) for r in _reading(plan, s, part // plan.block)]
            ends = range(part, min(part + step, length), keys)
            blocks += [(start + i, min(keys, length - i), begin, len(readers)) for i in ends]
    return np.array(blocks, np.int64).reshape(-1, 4), np.array(readers, np.int64)


def _reading(plan: Plan, seq: int, key_block: int) -> list[tuple[int, int]]:
    """The first query and the one after the last of each run of blocks that sees a block of keys."""
    sees = np.flatnonzero(plan.block_mask[seq, key_block:, key_block]) + key_block
    runs = np.split(sees, np.flatnonzero(np.diff(sees) > 1) + 1) if len(sees) else []
    length = int(plan.query_lens[seq])
    found = [(int(r[0]) * plan.block, min(int(r[-1] + 1) * plan.block, length)) for r in runs]
    return [(first, end) for first, end in found if first < end]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    share_out: bool,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (N', Hq, D) and k, v (N, Hkv, D) with each token's heads together, or contiguous pages (P, Hkv, page, D), with
    scales (P, Hkv, page) where they are int8 or fp8 -> (N', Hq, Dv), and (N, Hq) fp32 base 2 logarithms of the sums,
    without `share_out`: with it programs may take a segment each, in the same bits."""
    heads, v_dim = q.shape[1], v.shape[-1]
    out = torch.empty((len(q), heads, v_dim), dtype=q.dtype, device=q.device)
    logs = torch.empty((plan.num_tokens, heads), dtype=torch.float32, device=q.device)
    sinks = None if sinks is None else sinks.contiguous()
    if k.dtype == torch.float8_e4m3fn and not _has_fp8(q.device):
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks, "kv_scales": kv_scales}
    for members, shared in shares_of(plan, window) if share_out else [("all", False)]:
        _attend(q, k, v, plan, members, out, logs, shared=shared, **options)
    if plan.num_repeats:
        out[plan.num_tokens :] = out[plan.num_tokens - 1]
    return out, logs


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    members: Members,
    out: torch.Tensor,
    logs: torch.Tensor,
    *,
    shared: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """The rows of some sequences to `out`, and where segments are not `shared` out to `logs`."""
    heads, kv_heads, dim, v_dim = q.shape[1], k.shape[1], q.shape[2], v.shape[-1]
    group = heads // kv_heads
    many = not shared and plan.most_queries > _FEW_QUERIES
    tile = tile_of(q.dtype, dim, v_dim, group, many=many)
    work, (seqs, page_table) = work_of(plan, group, window, tile, members, shared=shared), _sequences(plan)
    items = work.shares if shared else work.items
    part_rows = min(tile.rows, group * min(plan.most_queries, _FEW_QUERIES))  # the others of a tile are none
    parts = (len(items) if shared else 0, kv_heads, part_rows)
    part_acc, part_m, part_total = (
        torch.empty(shape, dtype=torch.float32, device=q.device) for shape in ((*parts, v_dim), parts, parts)
    )
    k_scales, v_scales = (q, q) if kv_scales is None else kv_scales
    if len(items):
        launch(
            _forward, (len(items), kv_heads),
            q, k, v, k_scales, v_scales, out, logs, q if sinks is None else sinks, items, seqs,
            seqs if work.ranges is None else work.ranges, page_table, part_acc, part_m, part_total, page_table.shape[1],
            part_rows, *map(token_step, (q, k, v)), heads, kv_heads, dim, v_dim, float(scale), float(softcap or 0.0),
            window or 0,
            PAGED=plan.page_table is not None, PAGE=plan.page_tokens or 1, SCALED=kv_scales is not None, SPLIT=shared,
            LISTED=work.ranges is not None, SOFTCAP=softcap is not None, WINDOW=_kind(window, tile),
            SINKS=sinks is not None, GROUP=group, ROWS=tile.rows, KEYS=tile.keys, DIM=tile.dim, V_DIM=tile.v_dim,
            SEGMENT=SEGMENT, num_warps=tile.warps, num_stages=_STAGES, enable_fp_fusion=False,
        )  # fmt: skip
    if shared:
        launch(
            _join, (len(work.items), kv_heads),
            out, q if sinks is None else sinks, work.items, part_acc, part_m, part_total, part_rows, heads, kv_heads, v_dim,
            SINKS=sinks is not None, GROUP=group, ROWS=tile.rows, V_DIM=tile.v_dim, num_warps=tile.warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def _kind(window: int | None, tile: Tile) -> int:
    """0 = no window, 1 = one that is narrower than a tile of keys, 2 = another."""
    return 0 if window is None else 1 + (window >= tile.keys)


def _has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _NATIVE_FP8


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logs: torch.Tensor,
    grad: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Those of q, k, v and sinks of a pack, from what `forward` gave; q, k, v with each token's heads together."""
    heads, kv_heads, dim, v_dim = q.shape[1], k.shape[1], q.shape[2], v.shape[-1]
    group = heads // kv_heads
    of_q, of_kv = backward_tiles(q.dtype, dim, v_dim, group)
    work, keys = work_of(plan, group, window, of_q), key_work_of(plan, of_kv.keys)
    seqs, _ = _sequences(plan)
    grad, out, delta = grad.contiguous(), out.contiguous(), torch.empty_like(logs)
    rows, block, warps = row_tile(v_dim)
    launch(
        _row_products, (triton.cdiv(delta.numel(), rows),),
        grad, out, delta, delta.numel(), v_dim, ROWS=rows, BLOCK=block, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    given = (
        *map(token_step, (q, k, v)),
        *(heads, kv_heads, dim, v_dim, float(scale), float(softcap or 0.0), window or 0),
    )
    common: dict[str, Any] = dict(
        SOFTCAP=softcap is not None, WINDOW=window is not None, GROUP=group, DIM=of_q.dim, V_DIM=of_q.v_dim,
        num_stages=_BACKWARD_STAGES, LISTED=work.ranges is not None, enable_fp_fusion=True,
    )  # fmt: skip
    launch(
        _grad_q, (len(work.items), kv_heads),
        q, k, v, grad, logs, delta, dq, work.items, seqs, seqs if work.ranges is None else work.ranges, *given,
        ROWS=of_q.rows, KEYS=of_q.keys, num_warps=of_q.warps, **common,
    )  # fmt: skip
    # registers hold the sums of keys and values both, but not of wide ones
    for of_k, of_v in ((True, False), (False, True)) if _is_wide(q.dtype, of_kv) else ((True, True),):
        launch(
            _grad_kv, (len(keys.blocks), kv_heads),
            q, k, v, grad, logs, delta, dk, dv, keys.blocks, keys.readers, seqs, *given,
            OF_K=of_k, OF_V=of_v, ROWS=of_kv.rows, KEYS=of_kv.keys, num_warps=of_kv.warps, **common,
        )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, None
    share = torch.exp2(sinks.float() * _LOG2E.value - logs)
    return dq, dk, dv, -(share * delta).sum(0).to(sinks.dtype)
