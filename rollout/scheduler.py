"""Who runs in the next forward pass: admission, chunked prefill, page growth, group fork, preemption.

A `Prefill` is work over tokens that are all known: a prompt shared by the samples of one request, or the
whole text of one sample that was preempted. When its last token is through, its samples draw their next token
from the same logits and become decoding ones: full pages are shared, the last partial page is copied. What begins
like work that is being prefilled waits until it can share its pages. Where all layers have a window, pages that no
later query sees are given back. Nothing here decides any result: a sample's tokens do not depend on when it runs. Not
here: tensors (`rlhf.rollout.runner`), who comes first (`rlhf.rollout.policies`), how far queries see (`rlhf.rollout.reach`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlhf.rollout.cache import PagePool, prefix_digests
from rlhf.rollout.drafts import Drafts, Guesses
from rlhf.rollout.policies import Queue
from rlhf.rollout.reach import Reach
from rlhf.rollout.request import EngineConfig
from rlhf.rollout.samples import ABORTED, RUNNING, Job, Samples

if TYPE_CHECKING:
    import torch

    from rlhf.rollout.handover import PromptPages

_MOST_PUT_OFF = 64  # waiting prefills that a pass looks past because another makes their prefix


class PutBy(Protocol):
    """What holds the contents of pages, and keeps them elsewhere: `rlhf.rollout.cache.KVPages`."""

    def save(self, pages: list[int]) -> Any: ...

    def load(self, saved: Any, pages: list[int]) -> None: ...

    def write(self, flat: torch.Tensor, num_tokens: int, pages: list[int], start: int) -> None: ...


@dataclass(eq=False)
class Prefill:
    """Tokens to bring into the cache for some samples of one request."""

    job: Job
    samples: np.ndarray  # (k,) sample rows, all at the same text
    token_ids: np.ndarray  # (n,) int64
    expected_tokens: float = 0.0  # of the response, by earlier ones
    digests: list[bytes] = field(default_factory=list)  # of its full pages, under `version`
    version: int | None = None
    pages: list[int] = field(default_factory=list)  # while it is in work, by their places in the text
    first_page: int = 0  # of those that it still holds; entries before it repeat that one
    done: int = 0  # tokens in the cache already
    saved: Any = None  # what one sample's pages held when it gave way, and how many there were
    num_saved: int = 0
    handed: PromptPages | None = None  # what another engine prefilled of its tokens

    @property
    def held(self) -> list[int]:
        return self.pages[self.first_page :]

    @property
    def is_scored(self) -> bool:
        """Whether the log-probs of its tokens are wanted and not known."""
        return self.job.scores is not None and not self.job.scores.is_complete


@dataclass(frozen=True)
class Chunk:
    """A part of a prefill that fits one forward pass."""

    prefill: Prefill
    start: int
    end: int
    num_scored: int = (
        0  # of its tokens, from the first: those whose logits say how likely the prompt's next one was
    )

    @property
    def is_last(self) -> bool:
        return self.end == len(self.prefill.token_ids)


@dataclass(frozen=True)
class Step:
    """One forward pass: each decoding sample's token and the guesses that follow it, then the chunks."""

    decoding: np.ndarray  # sample rows
    chunks: list[Chunk]
    guesses: Guesses  # for the decoding ones

    @property
    def completed(self) -> list[Prefill]:
        return [c.prefill for c in self.chunks if c.is_last]

    @property
    def drawing(self) -> np.ndarray:
        """Samples that draw after this pass: the decoding ones, then those of completed prefills."""
        return np.concatenate([self.decoding, *(p.samples for p in self.completed)])

    @property
    def num_logits(self) -> int:
        """Of the pass's logits, the first, those that draws use; then come those of scored prompts."""
        return len(self.decoding) + int(self.guesses.counts.sum()) + len(self.completed)

    @property
    def logit_rows(self) -> np.ndarray:
        """Which of the pass's logits the draws use, sample by sample of `drawing`: one for its next token and one after each
        guess. There is one row for each token of a decoding sample, and one for each completed prefill."""
        first = len(self.decoding) + int(self.guesses.counts.sum())
        shared = [np.full(len(p.samples), first + i) for i, p in enumerate(self.completed)]
        return np.concatenate([np.arange(first), *shared])


@dataclass
class Copies:
    """Pages to copy: the first num_tokens positions of each source to its target."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    num_tokens: int = 0


class Scheduler:
    """Holds the queues. The pool is the engine's: its prefix cache outlives what is in work."""

    def __init__(
        self,
        samples: Samples,
        pool: PagePool,
        config: EngineConfig,
        *,
        version: int,
        put_by: PutBy | None = None,
        drafts: Drafts | None = None,
        reach: Reach | None = None,
    ):
        self.samples, self.pool, self.config, self.version = samples, pool, config, version
        self.num_preempted = self.num_swapped = 0
        self.hit_tokens = self.prefill_tokens = self.handed_tokens = 0
        self._put_by, self._drafts = put_by, drafts
        self._reach = reach or Reach(None, config.page_tokens)
        self._pages_saved = 0
        self._waiting = Queue(config.policy)
        self._prefilling: list[Prefill] = []
        self._decoding = np.zeros(0, np.int64)  # oldest first

    @property
    def has_work(self) -> bool:
        return bool(len(self._decoding) or self._prefilling or len(self._waiting))

    @property
    def num_running(self) -> int:
        """Samples in work: decoding, or in a prefill that has begun."""
        return len(self._decoding) + sum(len(p.samples) for p in self._prefilling)

    @property
    def num_waiting(self) -> int:
        return self._waiting.num_samples

    def add(self, job: Job, expected_tokens: float = 0.0, handed: PromptPages | None = None) -> None:
        """Let a request wait for its turn. Samples that were begun before go on each by itself. `handed` is what another
        engine of the same weights prefilled of its prompt."""
        samples = self.samples
        running = job.rows[samples.finished[job.rows] == RUNNING]
        fresh = running[samples.count[running] == 0]
        if len(fresh):
            self._waiting.push(Prefill(job, fresh, job.prompt, expected_tokens, handed=handed))
        for row in running[samples.count[running] > 0]:
            text = samples.token_ids(row)
            self._waiting.push(Prefill(job, np.asarray([row]), text, expected_tokens, handed=handed))

    def remove(self, job: Job) -> None:
        """Take a request out of work; its unfinished samples are aborted."""
        samples = self.samples
        for work in self._waiting.remove(job.number):
            self._forget_saved(work)
        for prefill in [p for p in self._prefilling if p.job is job]:
            self.pool.release(prefill.held)
            self._prefilling.remove(prefill)
        own = np.isin(self._decoding, job.rows)
        for sample in self._decoding[own]:
            self._release(sample)
        self._decoding = self._decoding[~own]
        running = job.rows[samples.finished[job.rows] == RUNNING]
        samples.finished[running] = ABORTED

    def restart(self, version: int) -> None:
        """The weights are others: keys and values in the cache are stale, and what is in work is prefilled again."""
        self.version = version
        for sample in self._decoding[::-1]:
            self._release(sample)
            self._requeue(sample)
        self._decoding = self._decoding[:0]
        for prefill in self._prefilling[::-1]:
            self._put_back(prefill)
        self._prefilling = []
        for work in self._waiting:
            self._forget_saved(work)
            self._forget_handed(work)

    def schedule(self) -> Step:
        """Choose the next forward pass: every decoding sample, prefill chunks up to the token budget, and guesses where
        a pass has little else to do."""
        self._grow()
        self._admit()
        budget = self.config.max_batch_tokens - len(self._decoding)
        chunks = self._cut(budget)
        while not chunks and not len(self._decoding) and len(self._prefilling) > 1:
            self._preempt()  # prefills that wait for each other's pages
            chunks = self._cut(budget)
        assert chunks or len(self._decoding), "nothing to run although work is left"
        size = sum(c.end - c.start for c in chunks)
        return Step(self._decoding, chunks, self._guess(size, budget - size))

    def _cut(self, budget: int) -> list[Chunk]:
        """The next pieces of the prefills, in order, of `budget` tokens together."""
        chunks: list[Chunk] = []
        for prefill in self._prefilling:
            size = self._room(prefill, min(budget, len(prefill.token_ids) - prefill.done))
            if size <= 0:
                break
            chunks.append(_chunk(prefill, size))
            budget -= chunks[-1].end - chunks[-1].start
        return chunks

    def commit(self, step: Step) -> Copies:
        """Take note that the pass ran and `samples` recorded its tokens: forks, finished samples.

        Returns the page copies that must happen before the next pass.
        """
        if self.config.policy == "fair":
            self._account(step)
        finished = self.samples.finished
        for sample in step.decoding[finished[step.decoding] != RUNNING]:
            self._release(sample, remember=self.config.cache_responses)
        self._decoding = step.decoding[finished[step.decoding] == RUNNING]
        for chunk in step.chunks:
            chunk.prefill.done = chunk.end
            if self.config.prefix_cache:
                first, last = (at // self.config.page_tokens for at in (chunk.start, chunk.end))
                prefill = chunk.prefill
                self.pool.remember(prefill.pages[first:last], self._digests(prefill)[first:last])
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
        self._give_back()
        while True:
            rows = self._decoding
            needy = rows[samples.position(rows) == samples.num_pages[rows] * page_tokens]
            if len(needy) <= self.pool.num_available:
                break
            self._preempt()
        if len(needy):
            samples.table[needy, samples.num_pages[needy]] = self.pool.take(len(needy))
            samples.num_pages[needy] += 1

    def _give_back(self) -> None:
        """Pages of the decoding samples that no later query sees."""
        if self._reach.window is None:
            return
        samples, rows = self.samples, self._decoding
        first = self._reach.first_page(samples.position(rows))
        for i in np.flatnonzero(first > samples.first_page[rows]).tolist():
            row, now = rows[i], int(first[i])
            self.pool.release(samples.table[row, samples.first_page[row] : now].tolist())
            samples.table[row, :now] = samples.table[row, now]
            samples.first_page[row] = now

    def _room(self, prefill: Prefill, size: int) -> int:
        """How many of a prefill's next `size` tokens have pages, after it gave back what they do not see and got what it lacks;
        without a window it got all when it was admitted."""
        if self._reach.window is None or size <= 0:
            return size
        first = int(self._reach.first_page(prefill.done))
        if first > prefill.first_page:
            self.pool.release(prefill.pages[prefill.first_page : first])
            prefill.pages[:first] = [prefill.pages[first]] * first
            prefill.first_page = first
        size, page_tokens = min(size, self._reach.chunk_tokens), self.config.page_tokens
        missing = -(-(prefill.done + size) // page_tokens) - len(prefill.pages)
        prefill.pages += self.pool.take(min(max(missing, 0), self.pool.num_available))
        return min(size, len(prefill.pages) * page_tokens - prefill.done)

    def _admit(self) -> None:
        """Move waiting prefills into work, in order, while there are tokens, sequences and pages for them.

        A group waits until all its samples fit, so that its prompt is prefilled once; alone, it is split.
        What this pass has no tokens for waits too, and may find its prefix in the cache by then.
        """
        limit = min(self.config.max_sequences, self.config.max_batch_tokens)
        running = self.num_running
        budget = self.config.max_batch_tokens - len(self._decoding)
        budget -= sum(len(p.token_ids) - p.done for p in self._prefilling)
        coming = {d for p in self._prefilling for d in p.digests[p.done // self.config.page_tokens :]}
        put_off: list[Prefill] = []
        while len(self._waiting) and budget > 0 and len(put_off) < _MOST_PUT_OFF:
            prefill = self._waiting.pop()
            if prefill.saved is not None:
                if running >= limit or not self._bring_back(prefill):
                    self._waiting.push_front(prefill)
                    break
                running, budget = running + 1, budget - 1
                continue
            hits, first = self._find(prefill)
            if self._next_digest(prefill, len(hits)) in coming:
                self.pool.release(hits[first:])
                put_off.append(prefill)
                continue
            whole = -(-len(prefill.token_ids) // self.config.page_tokens)
            most = min(self._reach.prefill_pages(len(prefill.token_ids)), self.pool.num_pages)
            need = min(whole, first + most) - len(hits)
            # a page for each sample's own tokens, but one sample goes on in the last, partial page
            inherits = len(prefill.token_ids) % self.config.page_tokens > 0
            spare = self.pool.num_available - need - self._promised() + inherits
            fitting = min(len(prefill.samples), limit - running, spare)
            if not running:
                fitting = max(fitting, 1)
            if fitting < (len(prefill.samples) if running else 1):
                self.pool.release(hits[first:])
                self._waiting.push_front(prefill)
                break
            if fitting < len(prefill.samples):
                rest = prefill.samples[fitting:]
                self._waiting.push_front(replace(prefill, samples=rest))
                prefill.samples = prefill.samples[:fitting]
            prefill.pages, prefill.first_page = hits + self.pool.take(need), first
            prefill.done = len(hits) * self.config.page_tokens
            self.hit_tokens += prefill.done
            if prefill.job.cached_tokens is None:
                prefill.job.cached_tokens = min(prefill.done, len(prefill.job.prompt))
            self.prefill_tokens += len(prefill.token_ids)
            self._put_handed(prefill)
            self._prefilling.append(prefill)
            coming.update(self._digests(prefill)[prefill.done // self.config.page_tokens :])
            budget -= len(prefill.token_ids) - prefill.done
            running += len(prefill.samples)
        for prefill in reversed(put_off):
            self._waiting.push_front(prefill)

    def _guess(self, others: int, budget: int) -> Guesses:
        """What the decoding samples may write next, with pages for it; nobody gives way for those."""
        rows, samples, page_tokens = self._decoding, self.samples, self.config.page_tokens
        if self._drafts is None:
            return Guesses.none(len(rows))
        at = samples.position(rows)
        guesses = self._drafts.guess(rows, others, samples.limit[rows] - samples.count[rows] - 1, budget)
        missing = (at + guesses.counts) // page_tokens + 1 - samples.num_pages[rows]
        spare = self.pool.num_available - self._promised()
        for i in np.flatnonzero(missing > 0).tolist():
            row, count = rows[i], int(missing[i])
            if count > spare:
                guesses.counts[i] = samples.num_pages[row] * page_tokens - at[i] - 1
                continue
            have = samples.num_pages[row]
            samples.table[row, have : have + count] = self.pool.take(count)
            samples.num_pages[row] += count
            spare -= count
        return guesses

    def _promised(self) -> int:
        """Pages that admitted work will want next: one for each sample that may still outgrow its own."""
        samples, rows, page_tokens = self.samples, self._decoding, self.config.page_tokens
        most = samples.prompt_tokens[rows] + samples.limit[rows] - 1
        held = samples.num_pages[rows] - samples.first_page[rows]
        may_grow = (samples.num_pages[rows] * page_tokens < most) & (held < self._reach.most_held)
        growing = int(may_grow.sum())
        partial = sum(len(p.token_ids) % page_tokens > 0 for p in self._prefilling)
        return growing + sum(len(p.samples) for p in self._prefilling) - partial

    def _fork(self, prefill: Prefill, copies: Copies) -> None:
        """Hand a prefill's pages to its samples that go on: full pages shared, the partial one copied."""
        samples, pool = self.samples, self.pool
        full, partial = divmod(len(prefill.token_ids), self.config.page_tokens)
        pages, first = prefill.pages, prefill.first_page
        heirs = prefill.samples[samples.finished[prefill.samples] == RUNNING]
        if not len(heirs):
            pool.release(prefill.held)
            return
        if partial:  # the first heir keeps the partial page, the others need one each
            later = heirs[1 + pool.num_available :]
            heirs = heirs[: 1 + pool.num_available]
        else:
            later = heirs[:0]
        pool.share(pages[first:full], len(heirs) - 1)
        samples.table[heirs, : len(pages)] = pages
        samples.num_pages[heirs], samples.first_page[heirs] = len(pages), first
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

    def _release(self, sample: int, *, remember: bool = False) -> None:
        pages = self._pages(sample)
        if remember and self.config.prefix_cache:
            text = self.samples.token_ids(sample)[:-1]  # the last token never got keys and values
            job = self.samples.job[sample]
            assert job is not None, f"row {sample} is free"
            digests = prefix_digests(self.version, text, self.config.page_tokens, job.adapter)
            digests = digests[self.samples.first_page[sample] :]
            self.pool.remember(pages[: len(digests)], digests)
        self.pool.release(pages)
        self.samples.num_pages[sample] = self.samples.first_page[sample] = 0

    def _pages(self, sample: int) -> list[int]:
        """Those that it holds."""
        samples = self.samples
        return samples.table[sample, samples.first_page[sample] : samples.num_pages[sample]].tolist()

    def _bring_back(self, prefill: Prefill) -> bool:
        """Let a sample whose pages were put by go on, if there are pages for it."""
        samples, (sample,) = self.samples, prefill.samples
        position = int(samples.position(sample))
        first, end = int(self._reach.first_page(position)), position // self.config.page_tokens + 1
        needed = end - first
        spare = self.pool.num_available - (self._promised() if len(self._decoding) else 0)
        if needed > spare:
            return False
        pages = self.pool.take(needed)
        assert self._put_by is not None, "pages were put by without a place for them"
        self._put_by.load(prefill.saved, pages[: prefill.num_saved])
        self._forget_saved(prefill)
        samples.table[sample, :first], samples.table[sample, first:end] = pages[0], pages
        samples.num_pages[sample], samples.first_page[sample] = end, first
        self._decoding = np.append(self._decoding, sample)
        return True

    def _put_handed(self, prefill: Prefill) -> None:
        """Fill the pages of a prefill that were not found with what was handed over, to be found by others from now on."""
        handed, page_tokens = prefill.handed, self.config.page_tokens
        if handed is None or handed.num_tokens <= prefill.done:
            return
        assert self._put_by is not None, "pages were handed over without a place for them"
        first, full, end = prefill.done // page_tokens, handed.num_tokens // page_tokens, handed.num_tokens
        self._put_by.write(handed.data, end, prefill.pages[first : -(-end // page_tokens)], prefill.done)
        if self.config.prefix_cache:
            self.pool.remember(prefill.pages[first:full], self._digests(prefill)[first:full])
        self.prefill_tokens -= end - prefill.done
        self.handed_tokens += end - prefill.done
        prefill.done = end

    def _forget_handed(self, prefill: Prefill) -> None:
        """What other weights made is made again, the log-probs of a prompt that no sample has begun from too."""
        job = prefill.job
        if prefill.handed is not None and job.scores is not None and not self.samples.count[job.rows].any():
            job.scores.forget()
        prefill.handed = None

    def _forget_saved(self, prefill: Prefill) -> None:
        self._pages_saved -= prefill.num_saved
        prefill.saved, prefill.num_saved = None, 0

    # queues

    def _digests(self, prefill: Prefill) -> list[bytes]:
        if self.config.prefix_cache and prefill.version != self.version:
            prefill.digests = prefix_digests(
                self.version, prefill.token_ids, self.config.page_tokens, prefill.job.adapter
            )
            prefill.version = self.version
        return prefill.digests

    def _find(self, prefill: Prefill) -> tuple[list[int], int]:
        """Pages of a cached prefix that leaves at least one token to run, whose logits are needed; and the number of the first
        that is held, which those before it, seen by nobody, repeat."""
        if prefill.is_scored:
            return [], 0
        digests = self._digests(prefill)[: (len(prefill.token_ids) - 1) // self.config.page_tokens]
        if self._reach.pages_before is None:
            return self.pool.find(digests), 0
        first, pages = self.pool.find_end(digests, self._reach.pages_before)
        return pages[:1] * first + pages, first

    def _next_digest(self, prefill: Prefill, num_hits: int) -> bytes | None:
        """Of the first page that was not found."""
        usable = (len(prefill.token_ids) - 1) // self.config.page_tokens
        return self._digests(prefill)[num_hits] if self.config.prefix_cache and num_hits < usable else None

    def _preempt(self) -> None:
        """Take the pages of the work admitted last, of the least priority where that counts; it goes on later, to the
        same end."""
        self.num_preempted += 1
        if self._prefilling:
            self._put_back(self._prefilling.pop(self._least([p.job for p in self._prefilling])))
            return
        jobs = [self.samples.job[s] for s in self._decoding] if self.config.policy == "priority" else []
        at = self._least(jobs)
        sample = self._decoding[at]
        self._decoding = np.delete(self._decoding, at)
        saved, count = self._save(sample)
        self._release(sample)
        self._requeue(sample, saved, count)

    def _least(self, jobs: list[Job]) -> int:
        """Where the one of the least priority is, the last of equals."""
        if self.config.policy != "priority":
            return -1
        return min(range(len(jobs)), key=lambda i: (jobs[i].request.priority, -i))

    def _save(self, sample: int) -> tuple[Any, int]:
        """Put a sample's pages by, where that is wanted and there is room: as many as the cache has."""
        written = -(-int(self.samples.position(sample)) // self.config.page_tokens)
        pages = self._pages(sample)[
            : written - int(self.samples.first_page[sample])
        ]  # one more may be there for what is next
        if (
            self.config.preemption != "swap"
            or self._put_by is None
            or self._pages_saved + len(pages) > self.pool.num_pages
        ):
            return None, 0
        self.num_swapped += 1
        self._pages_saved += len(pages)
        return self._put_by.save(pages), len(pages)

    def _put_back(self, prefill: Prefill) -> None:
        self.pool.release(prefill.held)
        prefill.pages, prefill.first_page, prefill.done = [], 0, 0
        self._waiting.push_front(prefill)

    def _requeue(self, sample: int, saved: Any = None, num_saved: int = 0) -> None:
        job = self.samples.job[sample]
        assert job is not None, f"row {sample} is free"
        text = self.samples.token_ids(sample)
        self._waiting.push_front(Prefill(job, np.asarray([sample]), text, saved=saved, num_saved=num_saved))

    def _account(self, step: Step) -> None:
        for chunk in step.chunks:
            self._waiting.served(chunk.prefill.job.request.tenant, chunk.end - chunk.start, 0)
        for sample in step.drawing.tolist():
            job = self.samples.job[sample]
            if job is not None:
                self._waiting.served(job.request.tenant, 0, 1)


def _chunk(prefill: Prefill, size: int) -> Chunk:
    """The next `size` tokens, or fewer of a prompt whose logits are wanted."""
    start = prefill.done
    if not prefill.is_scored:
        return Chunk(prefill, start, start + size)
    scores = prefill.job.scores
    assert scores is not None
    end = start + min(size, scores.most_rows)
    return Chunk(prefill, start, end, scores.num_rows(start, end))
