"""y = x W^T + b as Triton kernels, in bits that depend on the row of x, the row of W, W's shape and the dtype alone.

The inner axis is cut into segments, whose number follows from W's shape: wide weights, whose columns fill a GPU, have one.
Each is added up by itself, step after step of one width, and segments are added up in their order: in one program that
walks them (what it has lies in a scratch that stays in the L2 cache: there are no registers for two tiles of sums), or by
`_add_up` where programs took a segment each, because few rows and columns do not fill a GPU. So the tile and the sharing
out may follow the number of rows. That rests on one instruction family adding up its products alike in tiles of every size:
16 bit tiles have at least 64 rows, which on Hopper is wgmma in all of them; `scripts/gpu_check.sh` compares the bits on
the device at hand. Tiles of 16 rows would be another family there (mma), whose sums of 16 products nobody promises to round
alike, and would win little: by an H100's rates the product of 64 rows, absent ones included, with a 4096 x 4096 weight takes its
tensor cores 3 us and reading the weight 10. Not here: gradients, for which ordinary products do (`rlhf.kernels.linear`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rlhf.kernels.gpu import launch

_WIDE = 8192  # columns, from which on a weight's rows are one segment
_WHOLE = 2048  # of narrower ones, the longest rows that are one segment
_HALVES = 8192  # the longest that are two; longer ones are four
_STEP = 64  # segments are multiples of it, and so of every tile's
_FULL = 128  # programs that fill a GPU, about
_LARGE = 96  # of the largest tiles, from which on they are worth it
_GROUP = 8  # rows of tiles that are worked on together, for the L2 cache
_ELEMENTS = 1024  # of a program that adds segments up


@triton.jit
def tile_of(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Where a tile's rows and columns begin; tiles that are near in number share rows of x and of W."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = tile % (GROUP * across)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def segment_product(
    x, weight, top, left, first, end, rows, columns, x_row, weight_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32: rows from `top` of x times rows from `left` of the weight, the numbers first to end of
    each."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    there = (top + m < rows)[:, None]
    a_at = m[:, None] * x_row + k[None, :]
    n = tl.minimum(n, columns - 1 - left)  # what columns beyond the end give is not kept
    b_at = n[None, :] * weight_row + k[:, None]
    x += top.to(tl.int64) * x_row + first
    weight += left.to(tl.int64) * weight_row + first
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        inside = k < end - start
        a = tl.load(x + a_at, mask=there & inside[None, :], other=0.0)
        b = tl.load(weight + b_at, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x += BLOCK_K
        weight += BLOCK_K
    return total


@triton.jit
def own_place(scratch, zero, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a program keeps a tile's sums between segments. `zero` is one that the compiler does not see: else it holds
    the addresses in registers that the loop over the segment needs."""
    m, n = zero + tl.arange(0, BLOCK_M), zero + tl.arange(0, BLOCK_N)
    return scratch + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N) + m[:, None] * BLOCK_N + n[None, :]


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, weight, bias, out, parts, rows, columns, inner, length, x_row, weight_row,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, MANY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    segments = tl.cdiv(inner, length) if MANY else 1
    own_tiles = tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))
    for item in range(0, own_tiles * segments):
        tile = tl.program_id(0) + item // segments * tl.num_programs(0)
        top, left = tile_of(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        first = (tl.program_id(1) if SPLIT else item % segments) * length
        total = segment_product(
            x, weight, top, left, first, tl.minimum(first + length, inner), rows, columns, x_row, weight_row,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        zero = tl.multiple_of(first // inner, BLOCK_N)  # see own_place
        if MANY:
            if first > 0:
                total += tl.load(own_place(parts, zero, BLOCK_M, BLOCK_N))
            tl.debug_barrier()
        if MANY and first + length < inner:
            tl.store(own_place(parts, zero, BLOCK_M, BLOCK_N), total)
            tl.debug_barrier()
        else:
            row, column = top + zero + tl.arange(0, BLOCK_M), left + zero + tl.arange(0, BLOCK_N)
            if BIAS and not SPLIT:
                total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
            to = parts + tl.program_id(1).to(tl.int64) * rows * columns if SPLIT else out
            tl.store(
                to + row.to(tl.int64)[:, None] * columns + column[None, :],
                total.to(to.dtype.element_ty),
                mask=(row < rows)[:, None] & (column < columns)[None, :],
            )


@triton.jit(do_not_specialize=["rows"])
def _add_up(parts, bias, out, rows, columns, segments, BIAS: tl.constexpr, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    size = tl.cast(rows, tl.int64) * columns
    total = tl.zeros((ELEMENTS,), tl.float32)
    for segment in range(0, segments):
        total += tl.load(parts + segment * size + at, mask=at < size, other=0.0)
    if BIAS:
        total += tl.load(bias + at % columns, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    resident: int  # programs of a multiprocessor at a time


# the largest tiles, then narrower ones, of which small products choose; up to 144 and 96 KiB are under way to a program
_LARGE_16 = Tile(128, 256, 64, 8, 3, 1)
_SMALL_16 = (Tile(64, 128, 64, 4, 4, 2), Tile(64, 64, 64, 4, 6, 2), Tile(64, 32, 64, 4, 8, 2))
_FLOAT, _FLOAT_ROW = Tile(64, 64, 16, 4, 3, 4), Tile(16, 64, 16, 4, 3, 4)  # fp32 is not for tensor cores


def segments_of(columns: int, inner: int) -> tuple[int, int]:
    """(how many segments the rows of a (columns, inner) weight are cut into, how long they are)."""
    count = 1 if columns >= _WIDE or inner <= _WHOLE else 2 if inner <= _HALVES else 4
    length = triton.cdiv(triton.cdiv(inner, count), _STEP) * _STEP
    return triton.cdiv(inner, length), length  # none is empty


def tile_for(rows: int, columns: int, segments: int, dtype: torch.dtype) -> Tile:
    """Any tile gives the same bits."""
    if dtype == torch.float32:
        return _FLOAT if rows > _FLOAT_ROW.rows else _FLOAT_ROW
    if rows > _SMALL_16[0].rows and _tiles(rows, columns, _LARGE_16) >= _LARGE:
        return _LARGE_16
    full = (tile for tile in _SMALL_16 if _tiles(rows, columns, tile) * segments >= _FULL)
    return next(full, _SMALL_16[-1])


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter few, so that programs have several tiles."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def with_rows_together(x: torch.Tensor) -> torch.Tensor:
    """(..., n) -> (N, n) whose rows' numbers lie one after another."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, whole: int | None = None
) -> torch.Tensor:
    """x (..., in), weight (out, in), bias (out,), alike and none of them empty -> (..., out). No gradient. Of a part of a
    weight's rows, or of several weights one after another, `whole` is how many rows the one has whose bits they keep."""
    rows_of_x, weight = with_rows_together(x), with_rows_together(weight)
    (rows, inner), columns = rows_of_x.shape, weight.shape[0]
    out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    count, length = segments_of(whole or columns, inner)
    tile = tile_for(rows, columns, count, x.dtype)
    tiles = _tiles(rows, columns, tile)
    split = count > 1 and tiles < _FULL and tile is not _LARGE_16
    programs = tiles if split else min(tiles, processors(x.device) * tile.resident)
    size = count * rows * columns if split else programs * tile.rows * tile.columns if count > 1 else 0
    parts = torch.empty(size, dtype=torch.float32, device=x.device) if size else out
    given = x if bias is None else bias
    launch(
        _forward, (programs, count if split else 1),
        rows_of_x, weight, given, out, parts, rows, columns, inner, length, rows_of_x.stride(0), weight.stride(0),
        BIAS=bias is not None, SPLIT=split, MANY=count > 1 and not split, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        BLOCK_K=tile.step, GROUP=_GROUP, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    if split:
        launch(
            _add_up, (triton.cdiv(rows * columns, _ELEMENTS),),
            parts, given, out, rows, columns, count, BIAS=bias is not None, ELEMENTS=_ELEMENTS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _tiles(rows: int, columns: int, tile: Tile) -> int:
    return triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
