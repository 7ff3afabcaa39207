"""The head's product and the log-softmax as one Triton kernel: a tile of logits stays in the registers that made it.

A program makes logits of 128 rows and 256 tokens as `rlhf.kernels.matmul_triton` does, rounds them as the head would, and
keeps what `rlhf.kernels.logprob_triton` keeps of a block. So log-probs are, bit for bit, those of the logits, and 3 numbers
are written for 256. The backward makes the logits again, a part of the vocabulary at a time, and turns them into their
slopes where they lie; the products with these are ordinary ones. See `rlhf.kernels.linear_logprob`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf.kernels import logprob_triton, matmul_triton
from rlhf.kernels.gpu import launch
from rlhf.kernels.logprob_triton import BLOCK, Parts, Rows, Scale, block_sums, over
from rlhf.kernels.matmul_triton import Tile, processors, segment_product, tile_of, with_rows_together

_TILE, _FLOAT = Tile(128, BLOCK, 64, 8, 3, 1), Tile(32, BLOCK, 16, 8, 2, 2)
_GROUP = 8  # rows of tiles that are worked on together, for the L2 cache
_ELEMENTS = 1 << 26  # logits made at a time where they are made
_SHARE = 40  # or that part of all of them, if it is less
_LEAST = 1 << 20


@triton.jit(do_not_specialize=["rows"])
def _forward(
    hidden, weight, bias, temperatures, targets, picked, tops, totals, weighted, rows, vocabulary, inner, hidden_row,
    weight_row,
    BIAS: tl.constexpr, SCALED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(vocabulary, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * blocks, tl.num_programs(0)):
        top, left = tile_of(tile, rows, vocabulary, BLOCK_M, BLOCK_N, GROUP)
        z = segment_product(
            hidden,
            weight,
            top,
            left,
            0,
            inner,
            rows,
            vocabulary,
            hidden_row,
            weight_row,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        row, token = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
        there = row < rows
        if BIAS:
            z += tl.load(bias + token, mask=token < vocabulary, other=0.0).to(tl.float32)[None, :]
        z = z.to(hidden.dtype.element_ty).to(tl.float32)
        if SCALED:
            z = over(z, tl.load(temperatures + row, mask=there, other=1.0)[:, None])
        z = tl.where(token[None, :] < vocabulary, z, float("-inf"))
        target = tl.load(targets + row, mask=there, other=-1)
        score = tl.sum(tl.where(token[None, :] == target[:, None], z, 0.0), 1)
        is_here = (target >= left) & (target < tl.minimum(left + BLOCK_N, vocabulary))
        tl.store(picked + row, score, mask=is_here)
        m, sums, more = block_sums(z, 1, ENTROPY)
        at = row.to(tl.int64) * blocks + left // BLOCK_N
        tl.store(tops + at, m, mask=there)
        tl.store(totals + at, sums, mask=there)
        if ENTROPY:
            tl.store(weighted + at, more, mask=there)


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float | torch.Tensor,
    entropy: bool,
) -> Rows:
    """hidden (M, H), weight (V, H), bias (V,), targets (M,), none of them empty."""
    hidden, weight, targets = with_rows_together(hidden), with_rows_together(weight), targets.contiguous()
    scale = logprob_triton.scale_of(temperature, len(hidden), hidden.device)
    parts = logprob_triton.empty_parts(len(hidden), len(weight), entropy, hidden.device)
    if matmul_triton.segments_of(*weight.shape)[0] == 1:
        _in_one(hidden, weight, bias, targets, scale, parts, entropy)
    else:  # long rows of a small vocabulary, whose logits take little memory
        for rows in _pieces(len(hidden), len(hidden) * len(weight)):
            logits = matmul_triton.linear(hidden[rows], weight, bias)
            logprob_triton.fill_parts(logits, targets[rows], scale.of(rows), parts.of(rows), entropy)
    return logprob_triton.join(parts, entropy)


def _in_one(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: Scale,
    parts: Parts,
    entropy: bool,
) -> None:
    tile = _FLOAT if hidden.dtype == torch.float32 else _TILE
    tiles = triton.cdiv(len(hidden), tile.rows) * parts.tops.shape[1]
    launch(
        _forward, (min(tiles, processors(hidden.device) * tile.resident),),
        hidden, weight, hidden if bias is None else bias, scale.temperatures, targets, parts.picked, parts.tops,
        parts.totals, parts.weighted, len(hidden), len(weight), hidden.shape[1], hidden.stride(0), weight.stride(0),
        BIAS=bias is not None, SCALED=scale.scaled, ENTROPY=entropy, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        BLOCK_K=tile.step, GROUP=_GROUP, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip


def gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float | torch.Tensor,
    rows: Rows,
    grad: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Those of hidden, weight and bias, each where it is needed, from those of log-probs and entropies (M,) fp32. The
    vocabulary is worked on in parts: each gives its rows of the weight's gradient, once, and adds to that of `hidden`."""
    scale, targets = logprob_triton.scale_of(temperature, len(hidden), hidden.device), targets.contiguous()
    d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    d_bias = torch.empty_like(bias) if needs[2] else None
    for tokens in _pieces(len(weight), len(hidden) * len(weight)):
        given = None if bias is None else bias[tokens]
        slope = matmul_triton.linear(hidden, weight[tokens], given, whole=len(weight))
        logprob_triton.write_slopes(slope, slope, targets, scale, rows, grad, grad_entropy, tokens.start)
        if d_hidden is not None:
            d_hidden += slope @ weight[tokens]
        if d_weight is not None:
            torch.mm(slope.t(), hidden, out=d_weight[tokens])
        if d_bias is not None:
            d_bias[tokens] = slope.sum(0, dtype=torch.float32)
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


def _pieces(length: int, elements: int) -> list[slice]:
    """Slices of the rows or columns of a table of so many elements, each of a small part of these; a multiple of a block
    long but the last."""
    most = max(min(_ELEMENTS, elements // _SHARE), _LEAST)
    size = max(BLOCK, most * length // elements // BLOCK * BLOCK)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
