"""How far back the queries of a sequence see, counted in pages of the cache: pages behind that can be given back.

Here: the numbers, for models whose every layer has a sliding window; every other model's queries see all pages. Not here:
giving pages back (`rlhf.rollout.scheduler`), and the windows themselves, which attention masks (`rlhf.kernels.attention`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np

_LEAST_CHUNK = 1024  # tokens of a prompt that a pass may run, however short the window is
_ALL = 1 << 40  # pages, more than there are


@dataclass(frozen=True)
class Reach:
    """Of queries that see the last `window` positions, themselves included, in the layer that sees most; None: all."""

    window: int | None
    page_tokens: int

    @property
    def pages_before(self) -> int | None:
        """Pages before a page's first position that the query there sees; None: all."""
        return None if self.window is None else -(-self._behind // self.page_tokens)

    @property
    def most_held(self) -> int:
        """Pages that a sample may hold while it writes token by token."""
        return _ALL if self.pages_before is None else self.pages_before + 1

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a sequence that one pass may bring into the cache: its pages are held together."""
        return _ALL if self.window is None else max(self.window, _LEAST_CHUNK)

    @overload
    def first_page(self, position: int) -> int: ...

    @overload
    def first_page(self, position: np.ndarray) -> np.ndarray: ...

    def first_page(self, position: int | np.ndarray) -> int | np.ndarray:
        """The first page that queries at `position` and after it see. The page of the position before is never behind it."""
        if self.window is None:
            return position * 0
        return np.maximum(position - self._behind, 0) // self.page_tokens

    def prefill_pages(self, num_tokens: int) -> int:
        """Pages that bringing so many tokens into the cache may hold at once."""
        whole = -(-num_tokens // self.page_tokens)
        if self.window is None:
            return whole
        return min(whole, self.most_held - (-self.chunk_tokens // self.page_tokens))

    def sample_pages(self, prompt_tokens: int, num_tokens: int) -> int:
        """Pages that a sample of so many tokens in all may hold at once, its prompt prefilled in large pieces."""
        most = max(self.prefill_pages(prompt_tokens), self.most_held)
        return min(-(-num_tokens // self.page_tokens), most)

    def least_pages(self, num_tokens: int) -> int:
        """Pages without which a sequence of so many tokens cannot be run."""
        return min(-(-num_tokens // self.page_tokens), self.most_held)

    def longest(self, num_pages: int) -> int:
        """Tokens of the longest sequence that so many pages are enough for."""
        return _ALL if num_pages >= self.most_held else num_pages * self.page_tokens

    @property
    def _behind(self) -> int:
        """Positions before its own that a query sees; one at least, so that no sequence is without a page."""
        assert self.window is not None, "asked of layers without a window"
        return max(self.window - 1, 1)
