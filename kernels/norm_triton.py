"""RMSNorm as Triton kernels: one pass over memory forward, one backward. See `rlhf.kernels.norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf.kernels.gpu import aligned, launch, row_tile, token_step

_SHARES = 256  # parts in which a weight's gradient is added up, in one order
_BOTH = 8192  # longest row whose program has registers for both gradients


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    x, change, weight, out, num_rows, heads, width, x_token, weight_head, eps,
    CHANGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < width)
    head = row % heads
    at = row // heads * x_token + head * width + column
    a = tl.load(x + at, mask=inside, other=0.0)
    if CHANGES:
        a = (a.to(tl.float32) + tl.load(change + at, mask=inside, other=0.0).to(tl.float32)).to(a.dtype)
        tl.store(x + at, a, mask=inside)
    w = tl.load(weight + head * weight_head + column, mask=inside, other=0.0)
    a = a.to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a, 1) / width + eps)[:, None]
    normal = (a * scale).to(w.dtype).to(tl.float32)
    tl.store(out + row * width + column, (normal * w.to(tl.float32)).to(w.dtype), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    x, weight, grad, grad_x, grad_weight, num_rows, width, eps,
    X: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # n = x s;  dw = sum g n;  dx = s (g w - n mean(g w n))
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    share = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0) * ROWS
    for first in range(share * ROWS, num_rows, step):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < num_rows) & (column < width)
        at = row * width + column
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(a * a, 1) / width + eps)[:, None]
        normal = a * scale
        if WEIGHT:
            total += g * normal
        if X:
            mean = (tl.sum(g * w * normal, 1) / width)[:, None]
            d = scale * (g * w - normal * mean)
            tl.store(grad_x + at, d.to(grad_x.dtype.element_ty), mask=inside)
    if WEIGHT:
        sums = tl.sum(total, 0)[None, :]
        tl.store(grad_weight + share * width + column, sums, mask=column < width)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, change: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., H) with rows that lie one after another, or (N, heads, H) with each token's heads together; weight (H,) or
    (heads, H); `change` like x is added to x, which is `aligned` then, first, in place -> contiguous, like x."""
    width = x.shape[-1]
    tokens, heads = x.shape[:2] if x.dim() == 3 else (x.numel() // max(width, 1), 1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rows, block, warps = row_tile(width)
    x, weight, change = aligned(x), aligned(weight), None if change is None else aligned(change)
    token = token_step(x) if x.dim() == 3 else width
    launch(
        _forward, (triton.cdiv(tokens * heads, rows),),
        x, x if change is None else change, weight, out, tokens * heads, heads, width, token,
        width if weight.dim() == 2 else 0, eps, change is not None, rows, block, num_warps=warps,
        enable_fp_fusion=False,  # kv_triton.py adds up the same squares
    )  # fmt: skip
    return out


def gradients(
    x: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor, needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Those of x and weight (H,) for contiguous x and grad (..., H), each where it is needed."""
    width = x.shape[-1]
    num_rows = x.numel() // max(width, 1)
    rows, block, warps = row_tile(width)
    x, weight, grad = aligned(x), aligned(weight), aligned(grad)
    shares = min(_SHARES, triton.cdiv(num_rows, rows))
    dx = torch.empty_like(x) if needs[0] else None
    dw = torch.zeros((shares, width), dtype=torch.float32, device=x.device) if needs[1] else None
    wanted = (dx is not None, dw is not None)
    parts = [(True, False), (False, True)] if all(wanted) and block > _BOTH else [wanted]
    for of_x, of_weight in parts if shares else ():
        launch(
            _backward, (shares,),
            x, weight, grad, x if dx is None else dx, x if dw is None else dw, num_rows, width, eps,
            of_x, of_weight, rows, block, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, None if dw is None else dw.sum(0).to(weight.dtype)
