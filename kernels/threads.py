"""One thread for work that is not worth waking others for.

Here: a section in which torch keeps to the calling thread, and the same rule for functions of our own. torch shares an operation out from 32,768 elements on;
threads that wait passively (`rlhf` asks for that) take about 50 microseconds to wake, in which one thread does
half a million additions. Use it around elementwise operations, copies and sums along rows, whose values do not
depend on the number of threads. Not here: how many threads a process has.
"""

from __future__ import annotations

import torch

SMALL = 1 << 19  # elements


def worth(num_elements: int) -> int:
    """How many threads a function of our own gives to an elementwise pass over that many."""
    return 1 if num_elements <= SMALL else torch.get_num_threads()


class serial:
    """`with serial(num_elements):` one thread inside, if tensors of that size are small."""

    __slots__ = ("_before",)

    def __init__(self, num_elements: int) -> None:
        self._before = torch.get_num_threads() if num_elements <= SMALL else 1

    def __enter__(self) -> None:
        if self._before > 1:
            torch.set_num_threads(1)

    def __exit__(self, *exception: object) -> None:
        if self._before > 1:
            torch.set_num_threads(self._before)
