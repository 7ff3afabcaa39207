"""The engine: schedule, run, sample, commit, until every sample is finished.

It samples from the trainer's own model object; `set_version` tells it that the weights moved. Tokens in,
tokens out, ordered as asked; a completion depends on the weights, its prompt, its parameters and its seed,
and on nothing else. Not here: text, rewards, other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from rlhf.faults import fault_point
from rlhf.kernels.attention import KEY_STEP
from rlhf.kernels.random import uniform
from rlhf.kernels.sampling import sample
from rlhf.models.attention import kv_shapes
from rlhf.models.linear import weights_changed
from rlhf.rollout.cache import KVPages, PagePool, free_memory_bytes
from rlhf.rollout.request import Completion, EngineConfig, Request
from rlhf.rollout.runner import Runner
from rlhf.rollout.samples import RUNNING, Samples, draw_parameters
from rlhf.rollout.scheduler import Scheduler, Step

_MEMORY_SHARE = 0.5  # of the free memory that a cache of unset size may take


class Engine:
    """Samples completions from a model prepared by `rlhf.models.load`."""

    def __init__(self, model: PreTrainedModel, config: EngineConfig, *, version: int = 0):
        if config.page_tokens % KEY_STEP:
            raise ValueError(
                f"page_tokens={config.page_tokens} is not a multiple of {KEY_STEP}; use 16, 32, 64, ..."
            )
        self.model, self.config = model, config
        self.version = version  # optimiser steps in the weights
        self.stats: dict[str, float] = {}  # of the last call, by metric name
        self._context: int = model.config.get_text_config().max_position_embeddings
        self._vocab: int = model.get_input_embeddings().num_embeddings
        self._pages = KVPages(
            [(heads, size) for heads, size, _ in kv_shapes(model)],
            config.page_tokens,
            model.dtype,
            model.device,
        )
        self._pool = PagePool(0)
        self._runner = Runner(model, self._pages)
        self._generating = False

    def generate(
        self, requests: Sequence[Request], *, on_progress: Callable[[int, int], None] | None = None
    ) -> list[list[Completion]]:
        """Completions as [request][sample], in the order given.

        `on_progress(finished, total)` is called whenever samples finish. Raises ValueError, before any work,
        for duplicate ids, a prompt that fills the context or holds unknown token ids, and a cache too small
        for a request.
        """
        self._check(requests)
        samples = Samples(requests, page_tokens=self.config.page_tokens, context=self._context)
        self._reserve(samples)
        scheduler = Scheduler(samples, self._pool, self.config, version=self.version)
        self._generating, was_training = True, self.model.training
        self.model.eval()
        self._runner.forward.refresh()
        try:
            num_steps = self._loop(scheduler, samples, on_progress)
        except BaseException:
            self._drop_cache()  # pages of half-done work cannot be told from good ones
            raise
        finally:
            self._generating = False
            self.model.train(was_training)
        completions = samples.completions(self.version)
        if samples.num_nan:
            self._drop_cache()  # a NaN that stays in a page would reach the next sequence through 0 * NaN
        self._measure(scheduler, num_steps)
        return completions

    def set_version(self, version: int) -> None:
        """The weights are now those after `version` optimiser steps: cached prefixes and packed weights are
        stale.
        """
        if self._generating:
            raise RuntimeError(
                f"set_version({version}) during generate; weights may change only between calls"
            )
        self.version = version
        self._pool.forget()  # a version can come back with other weights, when a run is resumed
        weights_changed(self.model)
        self._runner.forward.forget()

    def sleep(self) -> None:
        """Give the memory of the cache and of the joined weights back while the trainer works."""
        self._drop_cache()
        self._runner.forward.forget()

    def wake(self) -> None:
        """Take the cache's memory again where its size is fixed; else the next call takes what it needs."""
        if self.config.cache_tokens is not None:
            self._grow(self.config.cache_tokens // self.config.page_tokens)

    # the loop

    def _loop(
        self, scheduler: Scheduler, samples: Samples, on_progress: Callable[[int, int], None] | None
    ) -> int:
        """Run until nothing is left; returns the number of forward passes."""
        num_steps = num_finished = 0
        halfway = (samples.limit.sum() + 1) // 2  # of the tokens, or of the samples, whichever is first
        before_half = True
        while scheduler.has_work:
            step = scheduler.schedule()
            logits = self._runner.run(step, samples)
            self._draw(step, samples, logits)
            copies = scheduler.commit(step)
            self._pages.copy(copies.sources, copies.targets, copies.num_tokens)
            num_steps += 1
            now_finished = int((samples.finished != RUNNING).sum())
            if before_half and (2 * now_finished >= len(samples) or samples.count.sum() >= halfway):
                before_half = False
                fault_point("rollout.mid")
            if on_progress is not None and now_finished > num_finished:
                on_progress(now_finished, len(samples))
            num_finished = now_finished
        return num_steps

    def _draw(self, step: Step, samples: Samples, logits: torch.Tensor) -> None:
        """One token for every sample that is due, recorded in `samples`."""
        rows = step.drawing
        if not len(rows):
            return
        device = logits.device
        if step.chunks:
            logits = logits[torch.from_numpy(step.logit_rows).to(device)]
        keys, counts = torch.from_numpy(samples.key[rows]), torch.from_numpy(samples.count[rows])
        parameters = draw_parameters(samples, rows, device)
        drawn = sample(logits, uniform(keys.to(device), counts.to(device)), **parameters)
        columns = (drawn.tokens, drawn.logprobs, drawn.processed_logprobs)
        samples.record(rows, *(column.cpu().numpy() for column in columns))

    # before and after

    def _check(self, requests: Sequence[Request]) -> None:
        seen: set[str] = set()
        for request in requests:
            name, prompt = request.id, request.prompt_ids
            if name in seen:
                raise ValueError(f"two requests have the id {name!r}; ids must be unique within one call")
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

    def _reserve(self, samples: Samples) -> None:
        """Make the cache large enough for this call, and refuse a sample that could never fit."""
        page_tokens = self.config.page_tokens
        written = samples.prompt_tokens + samples.limit - 1  # the last token never gets keys and values
        own = -(-written // page_tokens)
        largest = int(own.max(initial=0))
        if self.config.cache_tokens is not None:
            num_pages = self.config.cache_tokens // page_tokens
        else:
            together = min(len(samples), self.config.max_sequences)
            wanted = int(sum(sorted(own.tolist(), reverse=True)[:together]))
            in_memory = int(free_memory_bytes(self.model.device) * _MEMORY_SHARE) // self._pages.page_bytes
            num_pages = min(wanted, self._pool.num_pages + in_memory)
        num_pages = max(num_pages, self._pool.num_pages)
        if num_pages < largest:
            worst = samples.requests[samples.request[int(own.argmax())]].id
            raise ValueError(
                f"request {worst!r} needs up to {largest * page_tokens} tokens of cache and there are "
                f"{num_pages * page_tokens}; raise cache_tokens or lower max_tokens"
            )
        self._grow(num_pages)
        self._pool.peak_in_use = self._pool.num_in_use

    def _grow(self, num_pages: int) -> None:
        if num_pages > self._pool.num_pages:
            self._pages.grow(num_pages)
            self._pool.grow(num_pages)

    def _drop_cache(self) -> None:
        self._pages.clear()
        self._pool = PagePool(0)

    def _measure(self, scheduler: Scheduler, num_steps: int) -> None:
        self.stats = {
            "cache/hit_frac": scheduler.hit_tokens / max(scheduler.prefill_tokens, 1),
            "cache/used_frac": self._pool.peak_in_use / max(self._pool.num_pages, 1),
            "rollout/prefill_tokens": scheduler.prefill_tokens,
            "rollout/preempted": scheduler.num_preempted,
            "rollout/forward_passes": num_steps,
        }
