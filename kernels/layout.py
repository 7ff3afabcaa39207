"""How numbers lie in memory and how wide arithmetic is, for the operations of this folder."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are added up: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of the arithmetic."""
    return x.to(compute_dtype(x.dtype))


def heads_together(x: torch.Tensor) -> torch.Tensor:
    """(N, H, D) with each token's heads beside each other in memory; x itself where they are."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
