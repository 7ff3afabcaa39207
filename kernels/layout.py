"""How numbers lie in memory and how wide arithmetic is, for the operations of this folder."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch


class Noted:
    """Tensors as they are now, without keeping them: what was made of their numbers or addresses holds while they stay."""

    __slots__ = ("_state", "_tensors", "_written")

    def __init__(self, tensors: Iterable[torch.Tensor], *, written: bool) -> None:
        """`written`: a write to their numbers counts too. Those through `.data` leave no trace."""
        tensors = list(tensors)
        self._written = written
        self._tensors, self._state = [weakref.ref(t) for t in tensors], self._state_of(tensors)

    def hold(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether these are the very tensors, in the same memory: an address may be that of memory freed and given out again."""
        tensors = list(tensors)
        return (
            len(tensors) == len(self._tensors)
            and all(at() is t for at, t in zip(self._tensors, tensors, strict=True))
            and self._state == self._state_of(tensors)
        )

    def _state_of(self, tensors: list[torch.Tensor]) -> list[tuple[object, ...]]:
        if self._written:
            return [(t.data_ptr(), t.shape, t.dtype, t._version) for t in tensors]
        return [(t.data_ptr(), t.shape, t.dtype) for t in tensors]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are added up: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of the arithmetic."""
    return x.to(compute_dtype(x.dtype))


def heads_together(x: torch.Tensor) -> torch.Tensor:
    """(N, H, D) with each token's heads beside each other in memory; x itself where they are."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
