"""Who runs in the next forward pass: admission, chunked prefill, page growth, group fork, preemption by
recompute.

A `Prefill` is work over tokens that are all known: a prompt shared by the samples of one request, or the
whole text of one sample that was preempted. When its last token is through, its samples draw their next token
from the same logits and become decoding ones: full pages are shared, the last partial page is copied. Nothing
here decides any result: a sample's tokens do not depend on when it runs. Not here: tensors
(`rlhf.rollout.runner`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from rlhf.rollout.cache import PagePool, prefix_digests
from rlhf.rollout.request import EngineConfig
from rlhf.rollout.samples import RUNNING, Samples


@dataclass
class Prefill:
    """Tokens to bring into the cache for some samples of one request."""

    samples: np.ndarray  # (k,) sample rows, all at the same text
    token_ids: np.ndarray  # (n,) int64
    digests: list[bytes]  # of its full pages
    pages: list[int] = field(default_factory=list)  # held while it is in work
    done: int = 0  # tokens in the cache already


@dataclass(frozen=True)
class Chunk:
    """A part of a prefill that fits one forward pass."""

    prefill: Prefill
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.prefill.token_ids)


@dataclass(frozen=True)
class Step:
    """One forward pass: one token for each decoding sample, then the chunks."""

    decoding: np.ndarray  # sample rows
    chunks: list[Chunk]

    @property
    def completed(self) -> list[Prefill]:
        return [c.prefill for c in self.chunks if c.is_last]

    @property
    def drawing(self) -> np.ndarray:
        """Samples that draw a token after this pass, in the order of `logit_rows`."""
        return np.concatenate([self.decoding, *(p.samples for p in self.completed)])

    @property
    def logit_rows(self) -> np.ndarray:
        """Which of the pass's logits each of `drawing` uses: one row per decoding sample, one per completed
        prefill.
        """
        first = len(self.decoding)
        shared = [np.full(len(p.samples), first + i) for i, p in enumerate(self.completed)]
        return np.concatenate([np.arange(first), *shared])


@dataclass
class Copies:
    """Pages to copy: the first num_tokens positions of each source to its target."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    num_tokens: int = 0


class Scheduler:
    """Holds the queues of one call. The pool outlives it: the prefix cache is kept from call to call."""

    def __init__(self, samples: Samples, pool: PagePool, config: EngineConfig, *, version: int):
        self.samples, self.pool, self.config, self.version = samples, pool, config, version
        self.num_preempted = 0
        self.hit_tokens = self.prefill_tokens = 0
        self._waiting = deque(
            self._prefill(np.flatnonzero(samples.request == r), prompt)
            for r, prompt in enumerate(samples.prompts)
        )
        self._prefilling: list[Prefill] = []
        self._decoding = np.zeros(0, np.int64)  # oldest first

    @property
    def has_work(self) -> bool:
        return bool(len(self._decoding) or self._prefilling or self._waiting)

    def schedule(self) -> Step:
        """Choose the next forward pass: every decoding sample, then prefill chunks up to the token budget."""
        self._grow()
        budget = self.config.max_batch_tokens - len(self._decoding)
        self._admit(budget)
        chunks = []
        for prefill in self._prefilling:
            size = min(budget, len(prefill.token_ids) - prefill.done)
            if size <= 0:
                break
            chunks.append(Chunk(prefill, prefill.done, prefill.done + size))
            budget -= size
        assert chunks or len(self._decoding), "nothing to run although work is left"
        return Step(self._decoding, chunks)

    def commit(self, step: Step) -> Copies:
        """Take note that the pass ran and `samples` recorded its tokens: forks, finished samples.

        Returns the page copies that must happen before the next pass.
        """
        finished = self.samples.finished
        for sample in step.decoding[finished[step.decoding] != RUNNING]:
            self._release(sample)
        self._decoding = step.decoding[finished[step.decoding] == RUNNING]
        for chunk in step.chunks:
            chunk.prefill.done = chunk.end
        copies = Copies()
        completed = step.completed
        if completed:
            self._prefilling = [p for p in self._prefilling if p.done < len(p.token_ids)]
            for prefill in completed:
                self._fork(prefill, copies)
        return copies

    # pages

    def _grow(self) -> None:
        """A page for every decoding sample whose next token starts one; if none is left, the youngest work
        gives way.
        """
        samples, page_tokens = self.samples, self.config.page_tokens
        while True:
            rows = self._decoding
            needy = rows[samples.position(rows) == samples.num_pages[rows] * page_tokens]
            if len(needy) <= self.pool.num_available:
                break
            self._preempt_youngest()
        if len(needy):
            samples.table[needy, samples.num_pages[needy]] = self.pool.take(len(needy))
            samples.num_pages[needy] += 1

    def _admit(self, budget: int) -> None:
        """Move waiting prefills into work, in order, while there are tokens, sequences and pages for them.

        A group waits until all its samples fit, so that its prompt is prefilled once; alone, it is split.
        What this pass has no tokens for waits too, and may find its prefix in the cache by then.
        """
        limit = min(self.config.max_sequences, self.config.max_batch_tokens)
        running = len(self._decoding) + sum(len(p.samples) for p in self._prefilling)
        budget -= sum(len(p.token_ids) - p.done for p in self._prefilling)
        while self._waiting and budget > 0:
            prefill = self._waiting[0]
            hits = self._find(prefill)
            need = -(-len(prefill.token_ids) // self.config.page_tokens) - len(hits)
            # a page for each sample's own tokens, but one sample goes on in the last, partial page
            inherits = len(prefill.token_ids) % self.config.page_tokens > 0
            spare = self.pool.num_available - need - self._promised() + inherits
            fitting = min(len(prefill.samples), limit - running, spare)
            if not running:
                fitting = max(fitting, 1)
            if fitting < (len(prefill.samples) if running else 1):
                self.pool.release(hits)
                break
            self._waiting.popleft()
            if fitting < len(prefill.samples):
                rest = prefill.samples[fitting:]
                self._waiting.appendleft(Prefill(rest, prefill.token_ids, prefill.digests))
                prefill.samples = prefill.samples[:fitting]
            prefill.pages = hits + self.pool.take(need)
            prefill.done = len(hits) * self.config.page_tokens
            self.hit_tokens += prefill.done
            self.prefill_tokens += len(prefill.token_ids)
            self._prefilling.append(prefill)
            budget -= len(prefill.token_ids) - prefill.done
            running += len(prefill.samples)

    def _promised(self) -> int:
        """Pages that admitted work will want next: one for each sample that may still outgrow its own."""
        samples, rows, page_tokens = self.samples, self._decoding, self.config.page_tokens
        most = samples.prompt_tokens[rows] + samples.limit[rows] - 1
        growing = int((samples.num_pages[rows] * page_tokens < most).sum())
        partial = sum(len(p.token_ids) % page_tokens > 0 for p in self._prefilling)
        return growing + sum(len(p.samples) for p in self._prefilling) - partial

    def _fork(self, prefill: Prefill, copies: Copies) -> None:
        """Hand a prefill's pages to its samples that go on: full pages shared, the partial one copied."""
        samples, pool = self.samples, self.pool
        full, partial = divmod(len(prefill.token_ids), self.config.page_tokens)
        pages = prefill.pages
        if self.config.prefix_cache:
            pool.remember(pages[:full], prefill.digests)
        heirs = prefill.samples[samples.finished[prefill.samples] == RUNNING]
        if not len(heirs):
            pool.release(pages)
            return
        if partial:  # the first heir keeps the partial page, the others need one each
            later = heirs[1 + pool.num_available :]
            heirs = heirs[: 1 + pool.num_available]
        else:
            later = heirs[:0]
        pool.share(pages[:full], len(heirs) - 1)
        samples.table[heirs, : len(pages)] = pages
        samples.num_pages[heirs] = len(pages)
        if partial and len(heirs) > 1:
            own = pool.take(len(heirs) - 1)
            samples.table[heirs[1:], full] = own
            copies.sources.extend([pages[full]] * len(own))
            copies.targets.extend(own)
            copies.num_tokens = max(copies.num_tokens, partial)
        self._decoding = np.concatenate([self._decoding, heirs])
        for sample in later[::-1]:
            self.num_preempted += 1
            self._requeue(sample)

    def _release(self, sample: int) -> None:
        self.pool.release(self.samples.table[sample, : self.samples.num_pages[sample]].tolist())
        self.samples.num_pages[sample] = 0

    # queues

    def _prefill(self, samples: np.ndarray, token_ids: np.ndarray) -> Prefill:
        digests = []
        if self.config.prefix_cache:
            digests = prefix_digests(self.version, token_ids, self.config.page_tokens)
        return Prefill(samples, token_ids, digests)

    def _find(self, prefill: Prefill) -> list[int]:
        """Cached pages of a prefix that leaves at least one token to run, whose logits are needed."""
        return self.pool.find(prefill.digests[: (len(prefill.token_ids) - 1) // self.config.page_tokens])

    def _preempt_youngest(self) -> None:
        """Give back the pages of the work admitted last; it is computed again later, to the same end."""
        self.num_preempted += 1
        if self._prefilling:
            prefill = self._prefilling.pop()
            self.pool.release(prefill.pages)
            prefill.pages, prefill.done = [], 0
            self._waiting.appendleft(prefill)
        else:
            sample = self._decoding[-1]
            self._decoding = self._decoding[:-1]
            self._release(sample)
            self._requeue(sample)

    def _requeue(self, sample: int) -> None:
        self._waiting.appendleft(self._prefill(np.asarray([sample]), self.samples.token_ids(sample)))
