"""The engine: schedule, run, sample, commit, until every sample is finished.

It samples from the trainer's own model object; `set_version` tells it that the weights moved. Tokens in,
tokens out, ordered as asked; a completion depends on the weights, its prompt, its parameters and its seed,
and on nothing else. `generate` is for a batch; `add`, `step` and `abort` for requests that come and go; `prefill` for
prompts that another engine goes on with. A model that is split over processes (`rlhf.models.parallel`) has an engine in each,
which all are given the same calls. Not here: text, rewards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.faults import fault_point
from rlhf.kernels.attention import KEY_STEP
from rlhf.kernels.sampling import Sampled, sample
from rlhf.models.adapters import read_adapter
from rlhf.models.attention import kv_shapes, widest_window
from rlhf.models.linear import weights_changed
from rlhf.models.parallel import parallel_of, split_rows
from rlhf.rollout.cache import KVPages, PagePool, free_pages
from rlhf.rollout.drafts import Drafts, Guesses
from rlhf.rollout.grammar import Grammars
from rlhf.rollout.handover import (
    PageKind,
    PagesError,
    PromptPages,
    adapter_checksum,
    check_pages,
    prompt_pages,
    without_last_token,
)
from rlhf.rollout.lengths import Lengths
from rlhf.rollout.prompt_scores import PromptScores
from rlhf.rollout.reach import Reach
from rlhf.rollout.request import KV_DTYPES, WEIGHT_BITS, Completion, Delta, EngineConfig, Request, Update
from rlhf.rollout.runner import Runner
from rlhf.rollout.samples import RUNNING, Job, Samples, draw_parameters
from rlhf.rollout.scheduler import Prefill, Scheduler, Step
from rlhf.rollout.special import SpecialRows


class Engine:
    """Samples completions from a model prepared by `rlhf.models.load`. `tokenizer`, a fast Hugging Face one, is needed
    for stop texts and grammars only."""

    def __init__(
        self, model: PreTrainedModel, config: EngineConfig, *, version: int = 0, tokenizer: Any = None
    ):
        if config.page_tokens % KEY_STEP:
            raise ValueError(
                f"page_tokens={config.page_tokens} is not a multiple of {KEY_STEP}; use 16, 32, 64, ..."
            )
        self.model, self.config = model, config
        self._parallel = parallel_of(model)
        if self._parallel is not None:
            wholes = {name: rows.whole for name, rows in split_rows(model).items()}
            self._parallel.same("engine", config, version, wholes)
        self.version = version  # optimiser steps in the weights
        self.stats: dict[str, float] = {}  # of the last call, by metric name
        self._context: int = model.config.get_text_config().max_position_embeddings
        self._vocab: int = model.get_input_embeddings().num_embeddings
        self._pages = KVPages(
            [(heads, size) for heads, size, _ in kv_shapes(model)],
            config.page_tokens,
            KV_DTYPES.get(config.kv_dtype, model.dtype),
            model.device,
        )
        self._pool = PagePool(0)
        self._reach = Reach(widest_window(model), config.page_tokens)
        self._runner = Runner(model, self._pages, WEIGHT_BITS.get(config.weights), graphs=config.cuda_graphs)
        self._tokenizer, self._grammars = tokenizer, Grammars(tokenizer, self._vocab)
        self._lengths = Lengths()
        self._drafts = Drafts(config.draft_tokens, model.device.type)
        self._jobs: dict[str, Job] = {}  # in work
        self._adapters: dict[str, int] = {}  # numbers, which the runner knows; one is never used again
        self._adapter_numbers = itertools.count(1)
        self._adapter_checksums = {0: 0}  # by number
        self._leaving: dict[str, Request] = {}  # of `prefill`, by id
        self._left: dict[str, PromptPages] = {}
        self._generating = self._was_training = False
        self._begin_anew()

    # a batch

    def generate(
        self,
        requests: Sequence[Request],
        *,
        pages: Sequence[PromptPages | None] | None = None,
        enough: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Completions as [request][sample], in the order given.

        With `enough`, it ends when that many requests are finished; samples of the others come as far as they got,
        "aborted", and go on where `Request.begun` is given to a later call. `on_progress(finished, total)` is called
        whenever samples finish. `pages`, one or None for each request, are what another engine's `prefill` made of their
        prompts. Raises ValueError, before any work, for duplicate ids, a prompt that fills the context or holds unknown token
        ids, and a cache too small for a request; PagesError for pages that are of something else; RuntimeError while requests
        that were added are in work.
        """
        if self._jobs:
            raise RuntimeError(
                f"generate with {len(self._jobs)} added requests in work; finish or abort them first"
            )
        self._begin_anew()
        self._generating = True
        try:
            jobs = self._take_in(requests, pages)
            found = self._to_the_end(jobs, len(jobs) if enough is None else enough, on_progress)
        except BaseException:
            self._give_up()
            raise
        finally:
            self._generating = False
        self.measure()
        return [list(found[request.id]) for request in requests]

    def _to_the_end(
        self, jobs: Sequence[Job], enough: int, on_progress: Callable[[int, int], None] | None
    ) -> dict[str, tuple[Completion, ...]]:
        samples, found = self._samples, {}
        rows = [row for job in jobs for row in job.rows]
        halfway = (samples.limit[rows].sum() + 1) // 2  # of the tokens, or of the samples, whichever is first
        before_half, num_finished = True, 0
        while self._jobs and len(found) < enough:
            updates = self._step()
            now_finished = self._num_finished
            if before_half and (2 * now_finished >= len(rows) or self._num_written >= halfway):
                before_half = False
                fault_point("rollout.mid")
            found |= {u.request_id: u.completions for u in updates if u.completions is not None}
            if on_progress is not None and now_finished > num_finished:
                on_progress(now_finished, len(rows))
            num_finished = now_finished
        return found | {name: tuple(self.abort(name)) for name in list(self._jobs)}

    # requests that come and go

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    @property
    def num_running(self) -> int:
        """Samples in work."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Samples that wait for their turn."""
        return self._scheduler.num_waiting

    @property
    def pages_in_use(self) -> int:
        """Of the cache, by samples; what only the prefix cache holds does not count."""
        return self._pool.num_in_use

    @property
    def num_pages(self) -> int:
        """Of the cache; 0 while it is not there."""
        return self._pool.num_pages

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token."""
        return self._pages.token_bytes

    @property
    def counts(self) -> dict[str, int]:
        """Since the start, the last `generate` or the last failure: tokens brought into the cache, those of them that were
        found there, how often work gave way, tokens that were guessed, and those of them that stood."""
        scheduler = self._scheduler
        return {
            "prefill_tokens": scheduler.prefill_tokens,
            "hit_tokens": scheduler.hit_tokens,
            "preempted": scheduler.num_preempted,
            "drafted": self._drafts.num_drafted,
            "accepted": self._drafts.num_accepted,
        }

    def add(self, requests: Sequence[Request], *, pages: Sequence[PromptPages | None] | None = None) -> None:
        """Let requests wait for their turn, beside those in work. `pages` as `generate` takes them. Raises ValueError as that
        does; then none of them is taken."""
        self._take_in(requests, pages)

    def reserve(self, requests: Sequence[Request]) -> None:
        """Make the cache large enough for requests that will come beside those in work, as far as memory allows, so that it
        does not grow with each of them. Raises ValueError for one that it could never hold."""
        self._reserve(requests)

    def step(self) -> list[Update]:
        """One forward pass, and what came of it; nothing where there is no work."""
        if not self._jobs:
            return []
        try:
            return self._step()
        except BaseException:
            self._give_up()
            raise

    def abort(self, request_id: str) -> list[Completion]:
        """Take a request out of work; its samples as far as they got. Raises KeyError for one that is not in work."""
        if request_id not in self._jobs:
            raise KeyError(f"request {request_id!r} is not in work")
        job = self._jobs[request_id]
        self._done_at_once = [done for done in self._done_at_once if done is not job]
        self._scheduler.remove(job)
        return list(self._take_out(job))

    def count_anew(self) -> None:
        """`counts`, and the `stats` that `measure` brings up to date, begin at 0. Raises RuntimeError while there is work."""
        if self._jobs:
            raise RuntimeError(
                f"count_anew with {len(self._jobs)} requests in work; finish or abort them first"
            )
        self._begin_anew()

    def measure(self) -> None:
        """Bring `stats` up to date, as `generate` does at its end."""
        scheduler = self._scheduler
        self.stats = {
            "cache/hit_frac": scheduler.hit_tokens / max(scheduler.prefill_tokens, 1),
            "cache/used_frac": self._pool.peak_in_use / max(self._pool.num_pages, 1),
            "rollout/prefill_tokens": scheduler.prefill_tokens,
            "rollout/handed_tokens": scheduler.handed_tokens,
            "rollout/preempted": scheduler.num_preempted,
            "rollout/forward_passes": self._num_steps,
            "rollout/drafted_tokens": self._drafts.num_drafted,
            "rollout/accepted_tokens": self._drafts.num_accepted,
        }

    # prompts that another engine goes on with

    def prefill(self, requests: Sequence[Request]) -> list[PromptPages]:
        """Run the requests' prompts, all tokens but the last of each, for another engine to go on from: what its `generate`
        and `add` take as `pages`. Log-probs of prompts come with them where they were asked for. What is found in the prefix
        cache is not run again. Raises ValueError as `generate` does, RuntimeError while there is work."""
        if self._jobs:
            raise RuntimeError(f"prefill with {len(self._jobs)} requests in work; finish or abort them first")
        self._check_hand_over()
        self._check(requests)
        self._leaving = {request.id: request for request in requests}
        try:
            self.add([without_last_token(r) for r in requests if len(r.prompt_ids) > 1])
            while self._jobs:
                self.step()
            return [self._left[r.id] if r.id in self._left else self._pages_of(r, []) for r in requests]
        finally:
            self._leaving, self._left = {}, {}

    def _check_hand_over(self) -> None:
        if self._reach.window is not None:
            raise ValueError(
                f"every layer of {type(self.model).__name__} has a window, so that its prompts' pages are given back as they run; "
                "let one engine prefill and decode"
            )
        if self._parallel is not None:
            raise ValueError(
                "pages of a model that is split over processes are not handed over; let it prefill and decode"
            )

    def _hand_over(self, completed: Sequence[Prefill]) -> None:
        """Take what is to leave out of the cache, before its pages are given back."""
        for work in completed:
            request = self._leaving.get(work.job.request.id)
            if request is not None:
                self._left[request.id] = self._pages_of(request, work.pages, work.job.scores)

    def _pages_of(
        self, request: Request, pages: Sequence[int], scores: PromptScores | None = None
    ) -> PromptPages:
        scores = scores or self._prompt_scores(request)
        data = self._pages.read(pages, len(request.prompt_ids) - 1)
        kind = self._page_kind(request.adapter)
        return prompt_pages(request, kind, data, None if scores is None else scores.result())

    def _page_kind(self, adapter: str) -> PageKind:
        number = self._adapters[adapter] if adapter else 0
        if number not in self._adapter_checksums:
            self._adapter_checksums[number] = adapter_checksum(self._runner.adapters[number])
        weights, pages = self.config.weights, self._pages
        checksum = self._adapter_checksums[number]
        return PageKind(self.version, pages.shapes, pages.dtype, weights, adapter, checksum)

    def _check_pages(self, requests: Sequence[Request], pages: Sequence[PromptPages | None]) -> None:
        if len(pages) != len(requests):
            raise PagesError(
                f"pages for {len(pages)} requests, there are {len(requests)}; give one, or None, for each"
            )
        kinds: dict[str, PageKind] = {}
        if any(own is not None for own in pages):
            self._check_hand_over()
        for request, own in zip(requests, pages):
            if own is None:
                continue
            if request.adapter not in kinds:
                kinds[request.adapter] = self._page_kind(request.adapter)
            check_pages(request, own, kinds[request.adapter])

    # adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may ask for."""
        return tuple(self._adapters)

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Let requests ask for the LoRA adapter that peft wrote to `folder`. Requests of several adapters run in one
        batch, and a sample is that of the model with the adapter alone. Raises ValueError for a name that is taken or
        empty, a model that runs by its own modules, and what `rlhf.models.adapters.read_adapter` refuses."""
        if not name or name in self._adapters:
            raise ValueError(
                f"adapter name {name!r} is {'taken; remove that one first' if name else 'empty'}"
            )
        linears = self._runner.forward.adapted
        if not linears:
            raise ValueError(
                f"adapter {name!r}: {type(self.model).__name__} is no decoder of Llama's kind, so that requests cannot have "
                "adapters of their own; merge it into the model"
            )
        adapter = read_adapter(folder, linears, self.model.device)
        number = next(self._adapter_numbers)
        self._runner.adapters[number] = adapter
        self._adapters[name] = number

    def remove_adapter(self, name: str) -> None:
        """Raises KeyError for an unknown name, RuntimeError while requests of it are in work."""
        if name not in self._adapters:
            raise KeyError(f"there is no adapter {name!r}")
        users = [job.request.id for job in self._jobs.values() if job.request.adapter == name]
        if users:
            raise RuntimeError(
                f"adapter {name!r} has {len(users)} requests in work, {users[0]!r} first; finish or abort them"
            )
        del self._runner.adapters[self._adapters.pop(name)]

    def set_version(self, version: int) -> None:
        """The weights are now those after `version` optimiser steps: cached prefixes and packed weights are
        stale. Samples in work go on under the new weights, from a cache made anew; their tokens know their version.
        """
        if self._generating:
            raise RuntimeError(
                f"set_version({version}) during generate; weights may change only between calls"
            )
        if self._parallel is not None:
            self._parallel.same("version", version)
        self.version = version
        self._scheduler.restart(version)
        self._pool.forget()  # a version can come back with other weights, when a run is resumed
        weights_changed(self.model)
        self._runner.forget()
        if self._jobs:
            self._runner.refresh()

    def sleep(self) -> None:
        """Give the memory of the cache and of the joined weights back while the trainer works. Samples in work go on
        after `wake`."""
        self._scheduler.restart(self.version)
        self._drop_cache()
        self._runner.forget()

    def wake(self) -> None:
        """Take the cache's memory again where its size is fixed, or samples are in work; else the next call takes what it
        needs."""
        if self._jobs:
            self._reserve([])
            self._runner.refresh()
        elif self.config.cache_tokens is not None:
            self._grow(self.config.cache_tokens // self.config.page_tokens)

    # the loop

    def _take_in(
        self, requests: Sequence[Request], pages: Sequence[PromptPages | None] | None = None
    ) -> list[Job]:
        self._check(requests)
        handed = [None] * len(requests) if pages is None else pages
        self._check_pages(requests, handed)
        self._reserve(requests)
        if not self._jobs:
            self._was_training = self.model.training
            self.model.eval()
            self._runner.refresh()
        jobs = self._samples.add(requests)
        for job, own in zip(jobs, handed, strict=True):
            self._jobs[job.request.id] = job
            self._special.add(job)
            job.scores = self._prompt_scores(self._leaving.get(job.request.id, job.request))
            job.adapter = self._adapters[job.request.adapter] if job.request.adapter else 0
            limit = int(self._samples.limit[job.rows[0]])
            self._scheduler.add(job, self._lengths.expected(job.prompt, limit), own)
            if self._samples.is_done(job):  # it had been begun, and nothing was left to do
                self._done_at_once.append(job)
            elif job.scores is not None and own is not None and own.scores is not None:
                job.scores.take(own.scores)
        return jobs

    def _step(self) -> list[Update]:
        done, self._done_at_once = self._done_at_once, []
        updates = [self._finished(job) for job in done]
        if not self._scheduler.has_work:
            return updates
        step = self._scheduler.schedule()
        drawing = step.drawing
        if not self._decode(step):
            logits = self._runner.run(step, self._samples)
            self._score(step, logits[step.num_logits :])
            self._draw(step, logits)
        if self._leaving:
            self._hand_over(step.completed)
        copies = self._scheduler.commit(step)
        self._pages.copy(copies.sources, copies.targets, copies.num_tokens)
        self._num_steps += 1
        return updates + self._news(drawing)

    def _decode(self, step: Step) -> bool:
        """A step in which every sample goes on by one token, draws and all in one launch; False where it has to be run launch
        by launch."""
        if not self._runner.can_decode(step) or len(self._special.among(step.decoding)):
            return False
        rows, samples = step.decoding, self._samples
        parameters = draw_parameters(samples, rows, samples.count[rows], torch.device("cpu"))
        drawn = self._runner.decode(step, samples, parameters)
        if drawn is None:
            return False
        tokens, logprobs, processed = drawn
        self._record(
            rows, (tokens.astype(np.int64), logprobs.astype(np.float32), processed.astype(np.float32))
        )
        return True

    def _prompt_scores(self, request: Request) -> PromptScores | None:
        params = request.params
        if params.prompt_logprobs is None:
            return None
        prompt, at = np.asarray(request.prompt_ids, np.int64), params.temperature or 1.0
        return PromptScores(prompt, num_top=params.prompt_logprobs, temperature=at, vocab=self._vocab)

    def _score(self, step: Step, logits: torch.Tensor) -> None:
        """Note what the pass says of prompts whose log-probs were asked for."""
        for chunk in step.chunks:
            if chunk.num_scored:
                scores = chunk.prefill.job.scores
                assert scores is not None
                scores.note(chunk.start, logits[: chunk.num_scored])
                logits = logits[chunk.num_scored :]

    def _draw(self, step: Step, logits: torch.Tensor) -> None:
        """The next tokens of every sample that is due, recorded in its row."""
        rows = step.drawing
        if not len(rows):
            return
        if step.chunks:
            logits = logits[torch.from_numpy(step.logit_rows).to(logits.device)]
        guesses = step.guesses.with_none(len(rows) - len(step.decoding))
        special = self._special.among(rows)
        if not len(special):
            self._draw_plain(rows, guesses, logits)
            return
        plain = np.setdiff1d(np.arange(len(rows)), special)
        each = guesses.counts + 1
        of_special = np.repeat(np.isin(np.arange(len(rows)), special), each)
        if len(plain):  # a row's draw is its own, so that others can be drawn apart
            self._draw_plain(rows[plain], guesses[plain], logits[torch.from_numpy(~of_special)])
        self._draw_special(rows[special], logits[torch.from_numpy(of_special)])

    def _draw_plain(self, rows: np.ndarray, guesses: Guesses, logits: torch.Tensor) -> None:
        """A draw counts if all guesses before it are what was drawn."""
        samples, each = self._samples, guesses.counts + 1
        if not guesses.counts.any():
            self._record(rows, _columns(self._sample(rows, samples.count[rows], logits)))
            return
        row = np.repeat(rows, each)
        place = np.arange(len(row)) - np.repeat(np.cumsum(each) - each, each)
        drawn = self._sample(row, samples.count[row] + place, logits)
        columns = _columns(drawn)
        stood = guesses.stood(columns[0])
        self._drafts.learn(guesses, stood)
        last = np.repeat(stood, each)
        for i in range(int(stood.max()) + 1):
            at = (place == i) & (i <= last) & (samples.finished[row] == RUNNING)
            self._record(row[at], tuple(column[at] for column in columns))

    def _draw_special(self, rows: np.ndarray, raw: torch.Tensor) -> None:
        """One token each: nothing is guessed for these."""
        counts = self._samples.count[rows]
        parameters = draw_parameters(self._samples, rows, counts, raw.device)
        changed = self._special.logits(rows, raw)
        drawn = self._sample(rows, counts, changed)
        drawn = self._special.raw_logprobs(raw, drawn, parameters["temperature"])
        self._record(rows, _columns(drawn))
        self._special.note(rows, raw, changed, parameters)

    def _record(self, rows: np.ndarray, columns: tuple[np.ndarray, ...]) -> None:
        self._samples.record(rows, *columns, self.version)
        self._num_written += len(rows)

    def _sample(self, rows: np.ndarray, counts: np.ndarray, logits: torch.Tensor) -> Sampled:
        keys, at = (torch.from_numpy(x).to(logits.device) for x in (self._samples.key[rows], counts))
        return sample(logits, keys, at, **draw_parameters(self._samples, rows, counts, logits.device))

    def _news(self, drawing: np.ndarray) -> list[Update]:
        """Updates of the requests whose samples drew a token: of those that stream, and of those that are done."""
        samples = self._samples
        ended = samples.finished[drawing] != RUNNING
        self._num_finished += int(ended.sum())
        rows = drawing[ended | samples.streams[drawing]]
        updates = []
        for job in dict.fromkeys(samples.job[row] for row in rows.tolist()):
            assert job is not None, "a free row drew a token"
            deltas = self._deltas(job, drawing) if job.request.stream else ()
            if samples.is_done(job):
                updates.append(self._finished(job, deltas))
            elif deltas:
                updates.append(Update(job.request.id, deltas, None))
        return updates

    def _deltas(self, job: Job, drawing: np.ndarray) -> tuple[Delta, ...]:
        is_first = self._samples.told[job.rows] == 0
        news = tuple(self._samples.newest(job, drawing))
        if job.request.params.top_logprobs:
            news = tuple(replace(d, top_logprobs=self._special.newest(int(job.rows[d.index]))) for d in news)
        if job.scores is not None:
            prompt = job.scores.result()
            news = tuple(replace(d, prompt=prompt) if is_first[d.index] else d for d in news)
        if job.cached_tokens and is_first.any():
            news = tuple(
                replace(d, cached_tokens=job.cached_tokens) if is_first[d.index] else d for d in news
            )
        return news

    def _finished(self, job: Job, deltas: tuple[Delta, ...] = ()) -> Update:
        if job.request.id not in self._leaving:
            self._lengths.observe(job.prompt, self._samples.count[job.rows].tolist())
            self._drafts.finished(job)
        return Update(job.request.id, deltas, self._take_out(job))

    def _take_out(self, job: Job) -> tuple[Completion, ...]:
        completions = tuple(
            replace(c, top_logprobs=self._special.top(row)) if job.request.params.top_logprobs else c
            for c, row in zip(self._samples.completions(job), job.rows.tolist(), strict=True)
        )
        if job.scores is not None and job.scores.is_complete:
            prompt = job.scores.result()
            completions = tuple(replace(c, prompt=prompt) for c in completions)
        self._special.remove(job)
        self._drafts.forget(job)
        self._samples.free(job)
        del self._jobs[job.request.id]
        if not self._jobs:
            self.model.train(self._was_training)
            if (
                self._samples.num_nan
            ):  # one that stays in a page would reach the next sequence through 0 * NaN
                self._samples.num_nan = 0
                self._drop_cache()
        return completions

    # before and after

    def _check(self, requests: Sequence[Request]) -> None:
        seen: set[str] = set()
        for request in requests:
            name, prompt = request.id, request.prompt_ids
            if name in seen or name in self._jobs:
                raise ValueError(f"two requests have the id {name!r}; ids of those in work must be unique")
            seen.add(name)
            if len(prompt) + 1 > self._context:
                raise ValueError(
                    f"request {name!r}: a prompt of {len(prompt)} tokens leaves no room for a response in the "
                    f"model's context of {self._context}; shorten it to {self._context - 1} or filter it out"
                )
            if not 0 <= min(prompt) <= max(prompt) < self._vocab:
                bad = next(t for t in prompt if not 0 <= t < self._vocab)
                raise ValueError(
                    f"request {name!r}: token id {bad} is outside the model's vocabulary of {self._vocab}; "
                    "tokenizer and model do not match"
                )
            self._special.check(request, self._vocab)
            if request.adapter and request.adapter not in self._adapters:
                known = ", ".join(self._adapters) or "none"
                raise ValueError(
                    f"request {name!r}: adapter {request.adapter!r} is unknown; there are: {known}"
                )

    def _reserve(self, requests: Sequence[Request]) -> None:
        """Make the cache large enough for what is in work and these, and refuse a sample that could never fit."""
        page_tokens, reach = self.config.page_tokens, self._reach
        asked = list(requests)  # those in work fit a cache of fixed size, or would not be there
        if self.config.cache_tokens is None:
            asked += [job.request for job in self._jobs.values()]
        largest = max((reach.least_pages(self._most_written(r)) for r in asked), default=0)
        if self.config.cache_tokens is not None:
            num_pages = self.config.cache_tokens // page_tokens
        else:
            own = [reach.sample_pages(len(r.prompt_ids), self._most_written(r)) for r in asked]
            each = sorted((n for n, r in zip(own, asked) for _ in r.seeds), reverse=True)
            wanted = sum(each[: self.config.max_sequences])
            num_pages = min(wanted, self._pool.num_pages + self._free_pages())
        num_pages = max(num_pages, self._pool.num_pages)
        if num_pages < largest:
            worst = max(asked, key=self._most_written)
            raise ValueError(
                f"request {worst.id!r} needs up to {largest * page_tokens} tokens of cache and there are "
                f"{num_pages * page_tokens}; raise cache_tokens or lower max_tokens"
            )
        self._grow(num_pages)

    def _free_pages(self) -> int:
        free = free_pages(self._pages)
        return free if self._parallel is None else self._parallel.least("number of pages", free)

    def _most_written(self, request: Request) -> int:
        """Tokens of a sample that get keys and values: its last one never does."""
        return min(len(request.prompt_ids) + request.params.max_tokens, self._context) - 1

    def _grow(self, num_pages: int) -> None:
        if num_pages > self._pool.num_pages:
            self._pages.grow(num_pages)
            self._pool.grow(num_pages)

    def _drop_cache(self) -> None:
        self._pages.clear()
        self._pool = self._scheduler.pool = PagePool(0)

    def _begin_anew(self) -> None:
        """Nothing in work, counters at 0."""
        self._samples = Samples(page_tokens=self.config.page_tokens, context=self._context)
        self._drafts.begin_anew(self._samples)
        self._scheduler = Scheduler(
            self._samples,
            self._pool,
            self.config,
            version=self.version,
            put_by=self._pages,
            drafts=self._drafts,
            reach=self._reach,
        )
        self._special = SpecialRows(self._samples, self._tokenizer, self._grammars)
        self._done_at_once: list[Job] = []
        self._num_steps = self._num_finished = self._num_written = 0
        self._pool.peak_in_use = self._pool.num_in_use

    def _give_up(self) -> None:
        """After a failure: pages of half-done work cannot be told from good ones."""
        self._jobs.clear()
        self._drop_cache()
        self._begin_anew()
        self.model.train(self._was_training)


def _columns(drawn: Sampled) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `Samples.record` takes them."""
    tokens, logprobs, processed = (
        x.cpu().numpy() for x in (drawn.tokens, drawn.logprobs, drawn.processed_logprobs)
    )
    return tokens, logprobs, processed
