"""How long responses to a prompt were before: what the policies that sort by length go by.

Here: a moving mean per prompt, kept from epoch to epoch. Wrong guesses cost time, never a result.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

_NEWEST = 0.5  # weight of the newest response
_MOST = 1 << 20  # prompts remembered


class Lengths:
    """Mean response length by prompt, the newest weighing most; the prompts seen longest ago are forgotten first."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._mean: OrderedDict[bytes, float] = OrderedDict()

    def expected(self, prompt: np.ndarray, limit: int) -> float:
        """Tokens that a response to the prompt (n,) int64 will have; the limit where nothing is known."""
        return min(self._mean.get(prompt_digest(prompt), float(limit)), float(limit))

    def observe(self, prompt: np.ndarray, lengths: Sequence[int]) -> None:
        """Take note of finished responses."""
        digest = prompt_digest(prompt)
        for length in lengths:
            old = self._mean.pop(digest, float(length))
            self._mean[digest] = old + _NEWEST * (length - old)
        while len(self._mean) > self._most:
            self._mean.popitem(last=False)

    def __len__(self) -> int:
        return len(self._mean)


def prompt_digest(prompt: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(prompt, dtype=np.int64).tobytes(), digest_size=16).digest()
