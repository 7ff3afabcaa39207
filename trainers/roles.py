"""The roles as the loops see them: an actor that updates, a reference that scores, a sampler that generates.

Each role is a thin client of the group that hosts it: it shares work out to the group's processes and puts the
results back in order. Nothing here knows whether a group is local or remote, and nothing here is a formula.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlhf import rng
from rlhf.batching import plan_micro_batches
from rlhf.records import Batch, Prompt, Rollout, RolloutGroup
from rlhf.rollout import Request, SamplingParams
from rlhf.trainers.deepspeed_engine import UpdateStats


class Clock:
    """Seconds spent in each phase since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[f"time/{name}_s"] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """{"time/<phase>_s": seconds, "time/step_s": seconds since the last call}, and start again."""
        now = time.perf_counter()
        taken = dict(self._seconds) | {"time/step_s": now - self._start}
        self._seconds.clear()
        self._start = now
        return taken


def _share_out(batch: Batch, processes: int, max_tokens: int) -> list[list[list[int]]]:
    return plan_micro_batches(batch.lengths.tolist(), num_processes=processes, max_tokens=max_tokens)


def _score(group: Any, method: str, batch: Batch, max_tokens: int) -> torch.Tensor:
    """(B, T) fp32 log-probs of the response tokens, gathered from the group's processes in row order."""
    plan = _share_out(batch, group.size, max_tokens)
    results = group.call_each(method, [([batch.select(rows) for rows in micros],) for micros in plan])
    scores = torch.zeros(batch.token_ids.shape, dtype=torch.float32)
    for micros, tensors in zip(plan, results, strict=True):
        for rows, part in zip(micros, tensors, strict=True):
            if rows:
                scores[rows, : part.shape[1]] = part
    return scores


class Actor:
    """The policy that is trained."""

    def __init__(self, group: Any, clock: Clock, *, micro_batch_tokens: int) -> None:
        self.group, self._clock, self._max_tokens = group, clock, micro_batch_tokens

    def score(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: log-probs of the response tokens under the current weights, nats."""
        with self._clock.phase("score"):
            return _score(self.group, "score", batch, self._max_tokens)

    def update(self, batch: Batch, loss: str) -> UpdateStats:
        """One optimiser step on the whole batch; `loss` is "policy" or "sft"."""
        with self._clock.phase("update"):
            plan = _share_out(batch, self.group.size, self._max_tokens)
            args = [([batch.select(rows) for rows in micros], loss) for micros in plan]
            return self.group.call_each("update", args)[0]  # the processes agree: sums are global


class Reference:
    """The frozen policy that the KL is measured from."""

    def __init__(self, group: Any, clock: Clock, *, micro_batch_tokens: int) -> None:
        self.group, self._clock, self._max_tokens = group, clock, micro_batch_tokens

    def score(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: log-probs of the response tokens under the reference, nats."""
        with self._clock.phase("reference"):
            return _score(self.group, "score_reference", batch, self._max_tokens)


class Sampler:
    """The rollout engines, one in each process of their group."""

    def __init__(self, group: Any, clock: Clock, *, seed: int, decode: Callable[[Sequence[int]], str]) -> None:
        self.group, self._clock, self._seed, self._decode = group, clock, seed, decode

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, samples: int, purpose: str, step: int
    ) -> list[RolloutGroup]:
        """`samples` responses to each prompt, in the prompts' order.

        The randomness of one token is a function of (run seed, purpose, step, prompt id, sample, position): the number
        of engines and the order in which they finish change nothing.
        """
        requests = [
            Request(
                id=f"{step}/{i}",
                prompt_ids=prompt.token_ids,
                params=params,
                seeds=tuple(rng.key(self._seed, purpose, step, i, prompt.id, j) for j in range(samples)),
            )
            for i, prompt in enumerate(prompts)
        ]
        engines = self.group.size
        with self._clock.phase("rollout"):
            results = self.group.call_each("generate", [(requests[e::engines],) for e in range(engines)])
        completions = [results[i % engines][i // engines] for i in range(len(requests))]
        return [
            RolloutGroup(prompt, tuple(self._rollout(f"{step}/{i}/{c.index}", prompt, c) for c in group))
            for i, (prompt, group) in enumerate(zip(prompts, completions, strict=True))
        ]

    def _rollout(self, sample_id: str, prompt: Prompt, completion: Any) -> Rollout:
        return Rollout(
            sample_id=sample_id,
            prompt=prompt,
            response_ids=completion.token_ids,
            response_mask=(True,) * len(completion.token_ids),
            rollout_logprobs=completion.logprobs,
            policy_versions=completion.policy_versions,
            finish_reason=completion.finish_reason,
            response_text=self._decode(completion.token_ids),
        )
