"""The key/value cache: a pool of reference-counted pages, the prefix cache over it, and the tensors behind
it.

`PagePool` counts, `KVPages` holds the numbers. A page is free, referenced by one or more sequences, or idle:
cached under its prefix's digest, referenced by nobody, and taken when free pages run out (least recently used
first). Not here: which sequence gets a page (`rlhf.rollout.scheduler`).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from rlhf.kernels.kv import QUANTISED, KvScales, as_bytes

_MEMORY_SHARE = 0.5  # of the free memory that a cache of unset size may take


def prefix_digests(version: int, token_ids: np.ndarray, page_tokens: int, adapter: int = 0) -> list[bytes]:
    """A digest per full page of token_ids, each over the weight version, the adapter's number and every token up to the
    page's end.

    Version and adapter are part of the chain, so keys and values computed by other weights can never be found.
    """
    digest = f"version {version} adapter {adapter}".encode()
    digests = []
    for start in range(0, len(token_ids) - page_tokens + 1, page_tokens):
        page = np.ascontiguousarray(token_ids[start : start + page_tokens], dtype=np.int64)
        digest = hashlib.blake2b(digest + page.tobytes(), digest_size=16).digest()
        digests.append(digest)
    return digests


class PagePool:
    """Which pages are in use, by how many sequences, and which hold a known prefix."""

    def __init__(self, num_pages: int):
        self.references = np.zeros(num_pages, dtype=np.int64)
        self.peak_in_use = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_pages(self) -> int:
        return len(self.references)

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_in_use(self) -> int:
        return self.num_pages - self.num_available

    @property
    def num_cached(self) -> int:
        """Pages that hold a known prefix, in use or idle."""
        return len(self._page_of)

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages with one reference each; idle ones, oldest first, once none is free."""
        assert count <= self.num_available, f"{count} pages wanted, {self.num_available} available"
        for _ in range(count - len(self._free)):
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
            self._free.append(page)
        cut = len(self._free) - count
        pages = self._free[cut:][::-1]
        del self._free[cut:]
        self.references[pages] = 1
        self.peak_in_use = max(self.peak_in_use, self.num_in_use)
        return pages

    def share(self, pages: Sequence[int], times: int) -> None:
        """Add `times` references to each of the pages, which are in use already."""
        self.references[pages] += times

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference of each page. The last page of a prefix becomes the first to be evicted."""
        for page in reversed(pages):
            self.references[page] -= 1
            assert self.references[page] >= 0, f"page {page} released more often than taken"
            if self.references[page] == 0:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Pages of the longest cached prefix, each with a reference added."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._idle.pop(page, None)
            self.references[page] += 1
            pages.append(page)
        self.peak_in_use = max(self.peak_in_use, self.num_in_use)
        return pages

    def find_end(self, digests: Sequence[bytes], count: int) -> tuple[int, list[int]]:
        """(i, pages) of digests[i:n] for the longest prefix, of n pages, whose last `count` pages, or all there are, are
        cached; a reference is added to each."""
        end = len(digests)
        for first in range(len(digests) - 1, -1, -1):
            if digests[first] not in self._page_of:
                end = first
            elif end - first == count or first == 0:
                return first, self.find(digests[first:end])
        return 0, []

    def remember(self, pages: Sequence[int], digests: Sequence[bytes]) -> None:
        """Make pages findable by their prefix; a prefix that is known already keeps its page."""
        for page, digest in zip(pages, digests, strict=True):
            if digest not in self._page_of and page not in self._digest_of:
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def forget(self) -> None:
        """Drop every known prefix; idle pages become free."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def grow(self, num_pages: int) -> None:
        """Add free pages until there are `num_pages`; the others keep their contents and references."""
        old = self.num_pages
        self._free[:0] = range(num_pages - 1, old - 1, -1)
        self.references = np.concatenate([self.references, np.zeros(num_pages - old, dtype=np.int64)])


class KVPages:
    """Keys and values of all layers: per layer two tensors (pages, kv heads, page_tokens, head size), and for int8 and fp8
    two of fp32 scales (pages, kv heads, page_tokens).

    Zero at first: a position that is masked out contributes 0 * value, which must not be NaN.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], page_tokens: int, dtype: torch.dtype, device: torch.device
    ):
        self.shapes = tuple(shapes)  # (kv heads, head size) per layer
        self.page_tokens = page_tokens
        self.dtype, self.device = dtype, device
        self.is_quantised = dtype in QUANTISED
        self.clear()

    @property
    def num_pages(self) -> int:
        return len(self.k[0])

    @property
    def token_bytes(self) -> int:
        scale = torch.float32.itemsize if self.is_quantised else 0
        return 2 * sum(heads * (size * self.dtype.itemsize + scale) for heads, size in self.shapes)

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_bytes

    def grow(self, num_pages: int) -> None:
        """Make room for `num_pages`, keeping what is there."""
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._zeros(num_pages, *self.shapes[layer])
                as_bytes(tensors[layer])[: len(old)] = as_bytes(old)
        for layer, old in enumerate(self.scales or ()):
            self.scales[layer] = self._zero_scales(num_pages, layer)
            for to, given in zip(self.scales[layer], old):
                to[: len(given)] = given

    def clear(self) -> None:
        """Give the memory back."""
        self.k, self.v = ([self._zeros(0, *s) for s in self.shapes] for _ in "kv")
        layers = range(len(self.shapes))
        self.scales = [self._zero_scales(0, layer) for layer in layers] if self.is_quantised else None

    def copy(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        """Copy the first num_tokens positions of each source page to its target page, in every layer."""
        if not sources:
            return
        source = torch.as_tensor(sources, device=self.device)
        target = torch.as_tensor(targets, device=self.device)
        for pages in self._all():
            pages[target, :, :num_tokens] = pages[source, :, :num_tokens]

    def save(self, pages: Sequence[int]) -> list[torch.Tensor]:
        """The contents of pages, in host memory: what `load` takes."""
        rows = torch.as_tensor(pages, device=self.device)
        return [tensor[rows].cpu() for tensor in self._all()]

    def load(self, saved: Sequence[torch.Tensor], pages: Sequence[int]) -> None:
        """Put saved contents into as many pages."""
        rows = torch.as_tensor(pages, device=self.device)
        for tensor, contents in zip(self._all(), saved, strict=True):
            tensor[rows] = contents.to(self.device)

    def read(self, pages: Sequence[int], num_tokens: int) -> torch.Tensor:
        """(num_tokens * token_bytes,) uint8 in host memory: what pages hold at their first positions, the same whatever
        page_tokens is. What `write` takes."""
        flat = torch.empty(num_tokens * self.token_bytes, dtype=torch.uint8)
        full, rest = divmod(num_tokens, self.page_tokens)
        rows = torch.as_tensor(pages[: full + (rest > 0)], dtype=torch.int64, device=self.device)
        for tensor, part in self._with_parts(flat, num_tokens):
            held = tensor[rows].cpu()
            if full:
                body = part[:, : num_tokens - rest].unflatten(1, (full, self.page_tokens))
                body.copy_(held[:full].transpose(0, 1))
            if rest:
                part[:, num_tokens - rest :] = held[full, :, :rest]
        return flat

    def write(self, flat: torch.Tensor, num_tokens: int, pages: Sequence[int], start: int) -> None:
        """Put what `read` gave of num_tokens positions into pages, from position `start`, a multiple of page_tokens, on."""
        full, rest = divmod(num_tokens - start, self.page_tokens)
        rows = torch.as_tensor(pages[:full], dtype=torch.int64, device=self.device)
        for tensor, part in self._with_parts(flat, num_tokens):
            if full:
                body = part[:, start : num_tokens - rest].unflatten(1, (full, self.page_tokens))
                tensor[rows] = body.transpose(0, 1).to(self.device)
            if rest:
                tensor[pages[full], :, :rest] = part[:, num_tokens - rest :].to(self.device)

    def _with_parts(self, flat: torch.Tensor, num_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every tensor with its part (heads, num_tokens, ...) of flat bytes; scales first, for their address."""
        start = 0
        for tensor in reversed(self._all()):
            shape = (tensor.shape[1], num_tokens, *tensor.shape[3:])
            end = start + math.prod(shape) * tensor.element_size()
            yield tensor, flat[start:end].view(tensor.dtype).view(shape)
            start = end

    def _all(self) -> list[torch.Tensor]:
        """Every tensor; numbers of one byte as bytes."""
        return [as_bytes(x) for x in (*self.k, *self.v, *(s for pair in self.scales or () for s in pair))]

    def _zero_scales(self, num_pages: int, layer: int) -> KvScales:
        shape = (num_pages, self.shapes[layer][0], self.page_tokens)
        k, v = (torch.zeros(shape, dtype=torch.float32, device=self.device) for _ in "kv")
        return k, v

    def _zeros(self, num_pages: int, heads: int, size: int) -> torch.Tensor:
        full = (num_pages, heads, self.page_tokens, size)
        if self.device.type != "cpu" or num_pages == 0:
            return torch.zeros(full, dtype=self.dtype, device=self.device)
        # numpy asks the system for huge pages of memory: every step touches all sequences' keys, far apart
        memory = np.zeros(math.prod(full) * self.dtype.itemsize, np.uint8)
        return torch.from_numpy(memory).view(self.dtype).view(full)


def free_pages(pages: KVPages) -> int:
    """More pages of that kind that may be taken now."""
    return int(free_memory_bytes(pages.device) * _MEMORY_SHARE) // pages.page_bytes


def free_memory_bytes(device: torch.device) -> int:
    """Memory that could be taken on the device now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # torch's own, to be reused
        return torch.cuda.mem_get_info(device)[0] + unused
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line; set cache_tokens to size the cache by hand")
