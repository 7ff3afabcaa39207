"""The reference as a sampler: SPIN's opponent (arXiv 2401.01335), which is the reference of the iteration.

Its engines run the reference's own model, in the reference's group: what they sample from is what the loss compares
with, to the last bit, whatever moved it and also after a resume. Not here: when it moves (`rlhf.trainers.stage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.trainers.roles import Clock, Sampler


class Opponent(Sampler):
    """A sampler of the reference's responses; their version is that of the actor at the reference's last update."""

    def __init__(self, group: Any, clock: Clock, **options: Any) -> None:
        super().__init__(_EnginesOfReference(group), clock, **options)


class _EnginesOfReference:
    """The reference's group as `Sampler` sees one: its calls are for the engines of the reference."""

    def __init__(self, group: Any) -> None:
        self._group, self.size = group, group.size

    def call(self, method: str) -> list[Any]:
        return self._group.call(method, "reference")

    def call_each(self, method: str, args_per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._group.call_each(method, [(*args, "reference") for args in args_per_rank])
