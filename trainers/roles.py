"""The roles as the loops see them: an actor that updates, a reference that scores, a sampler that generates.

Each role is a thin client of the group that hosts it: it shares work out to the group's processes and puts the
results back in order. Nothing here knows whether a group is local or remote, and nothing here is a formula.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlhf import rng
from rlhf.batching import plan_groups, plan_micro_batches
from rlhf.records import Batch, Prompt, Rollout, RolloutGroup
from rlhf.rollout import Completion, Request, SamplingParams
from rlhf.trainers.deepspeed_engine import UpdateStats
from rlhf.trainers.handover import Apart, generate_apart


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


# What runs the prompt of neighbouring rows once (`rlhf.batching.pack`).
_SUMMED = (
    "rollout/handed_tokens",
    "rollout/preempted",
    "rollout/forward_passes",
    "rollout/drafted_tokens",
    "rollout/accepted_tokens",
)  # over engines and calls
_SHARING_SCORES = ("score", "score_with_values", "score_reference", "score_teacher", "score_values")


def _share_out(batch: Batch, processes: int, max_tokens: int, *, shares: bool) -> list[list[list[int]]]:
    """Which rows each process takes in each micro-batch; the two rows of a preference pair stay together, and with
    `shares`, where a prompt is run once for its neighbouring responses, as far as possible those of a group."""
    pairs = batch.labels is not None and batch.group_ids is not None
    if shares and batch.group_ids is not None and not pairs:
        return plan_groups(batch, num_processes=processes, max_tokens=max_tokens)
    units = batch.group_ids.tolist() if pairs else None
    return plan_micro_batches(
        batch.lengths.tolist(), num_processes=processes, max_tokens=max_tokens, units=units
    )


def _score(group: Any, method: str, batch: Batch, max_tokens: int, *args: Any) -> torch.Tensor:
    """What `method` gives for every row, (B,) or (B, T) fp32, gathered from the group's processes in row order."""
    plan = _share_out(batch, group.size, max_tokens, shares=method in _SHARING_SCORES)
    results = group.call_each(method, [([batch.select(rows) for rows in micros], *args) for micros in plan])
    rows = [row for micros in plan for part in micros for row in part]
    parts = [part for tensors in results for part in tensors]
    return _gathered(batch, rows, parts)


def _gathered(batch: Batch, rows: Sequence[int], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of the parts at their places in the batch, 0 where there is nothing."""
    first = parts[0]
    shape = batch.token_ids.shape if first.dim() > 1 else batch.token_ids.shape[:1]
    scores = torch.zeros((*shape, *first.shape[2:]), dtype=first.dtype)
    places = iter(rows)
    for part in parts:
        index = [next(places) for _ in range(len(part))]
        if index and part.dim() > 1:
            scores[index, : part.shape[1]] = part
        elif index:
            scores[index] = part
    return scores


class Actor:
    """The policy that is trained. `sharing` names the losses that run the prompt of neighbouring rows once."""

    def __init__(
        self, group: Any, clock: Clock, *, micro_batch_tokens: int, sharing: Collection[str]
    ) -> None:
        self.group, self._clock, self._max_tokens = group, clock, micro_batch_tokens
        self._sharing = sharing

    def score(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: log-probs of the response tokens under the current weights, nats."""
        with self._clock.phase("score"):
            return _score(self.group, "score", batch, self._max_tokens)

    def score_with_values(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) fp32 each, from one pass: log-probs, and values of the states before each response token."""
        with self._clock.phase("score"):
            both = _score(self.group, "score_with_values", batch, self._max_tokens)
        return both[..., 0], both[..., 1]

    def rewards(self, batch: Batch) -> torch.Tensor:
        """(B,) fp32: scores of whole responses, where the actor is a reward model."""
        with self._clock.phase("score"):
            return _score(self.group, "score_rewards", batch, self._max_tokens, "actor")

    def step_scores(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: logits at the steps' last tokens, where the actor is a process reward model."""
        with self._clock.phase("score"):
            return _score(self.group, "score_steps", batch, self._max_tokens, "actor")

    def update(self, *parts: tuple[Batch, str], **changing: float) -> UpdateStats:
        """One optimiser step on whole batches, each with its loss (a name in `trainers.forward.LOSSES`)."""
        with self._clock.phase("update"):
            return _update(self.group, "actor", parts, self._max_tokens, changing, sharing=self._sharing)


class Critic:
    """The value function that is trained beside the policy."""

    def __init__(self, group: Any, clock: Clock, *, micro_batch_tokens: int) -> None:
        self.group, self._clock, self._max_tokens = group, clock, micro_batch_tokens

    def score(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: values of the states before each response token."""
        with self._clock.phase("value"):
            return _score(self.group, "score_values", batch, self._max_tokens)

    def update(self, batch: Batch) -> UpdateStats:
        """One optimiser step on the whole batch."""
        with self._clock.phase("update_critic"):
            parts = [(batch, "value")]
            return _update(self.group, "critic", parts, self._max_tokens, {}, sharing=("value",))


def _update(
    group: Any,
    role: str,
    parts: Sequence[tuple[Batch, str]],
    max_tokens: int,
    changing: Mapping[str, float],
    *,
    sharing: Collection[str],
) -> UpdateStats:
    """Share every part out; each process gets [(micro-batch, loss)], as many as every other process."""
    shares: list[list[tuple[Batch, str]]] = [[] for _ in range(group.size)]
    for batch, loss in parts:
        plan = _share_out(batch, group.size, max_tokens, shares=loss in sharing)
        for share, micros in zip(shares, plan, strict=True):
            share.extend((batch.select(rows), loss) for rows in micros)
    return group.call_each("update", [(role, share, dict(changing)) for share in shares])[
        0
    ]  # sums are global


class Reference:
    """The policy that the KL, or a preference, is measured from."""

    def __init__(self, group: Any, clock: Clock, *, micro_batch_tokens: int) -> None:
        self.group, self._clock, self._max_tokens = group, clock, micro_batch_tokens

    def score(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: log-probs of the response tokens under the reference, nats."""
        with self._clock.phase("reference"):
            return _score(self.group, "score_reference", batch, self._max_tokens)


class RewardModel:
    """A frozen model that scores whole responses, or their steps."""

    def __init__(self, group: Any, clock: Clock, *, micro_batch_tokens: int) -> None:
        self.group, self._clock, self._max_tokens = group, clock, micro_batch_tokens

    def score(self, batch: Batch) -> torch.Tensor:
        """(B,) fp32: the score at each row's last token."""
        with self._clock.phase("reward_model"):
            return _score(self.group, "score_rewards", batch, self._max_tokens, "reward")

    def step_scores(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: of a process reward model, logits at the steps' last tokens, which the loss mask marks."""
        with self._clock.phase("reward_model"):
            return _score(self.group, "score_steps", batch, self._max_tokens, "reward")

    def step_separator(self) -> str | None:
        """What ends every step that a process reward model judges; None for any other model."""
        return self.group.call("step_separator")[0]


class JudgeModel:
    """A frozen language model that is asked for verdicts."""

    def __init__(self, group: Any, clock: Clock, *, micro_batch_tokens: int) -> None:
        self.group, self._clock, self._max_tokens = group, clock, micro_batch_tokens

    def ask(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, 2) fp32, for each text the probability of the good verdict and that of either; NaN where it is too long."""
        size = self.group.size
        with self._clock.phase("judge"):
            results = self.group.call_each("judge", [(texts[i::size], self._max_tokens) for i in range(size)])
        answers = torch.empty(len(texts), 2)
        for i, result in enumerate(results):
            answers[i::size] = result
        return answers


class Teacher:
    """A frozen model whose distribution is imitated."""

    def __init__(self, group: Any, clock: Clock, *, micro_batch_tokens: int) -> None:
        self.group, self._clock, self._max_tokens = group, clock, micro_batch_tokens

    def score(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: log-probs of the response tokens under the teacher, nats."""
        with self._clock.phase("teacher"):
            return _score(self.group, "score_teacher", batch, self._max_tokens)

    def top(self, batch: Batch) -> Batch:
        """The batch with the teacher's likeliest tokens at every loss token, (B, T, K), and their log-probs and that of
        any other token, (B, T, K + 1)."""
        with self._clock.phase("teacher"):
            plan = _share_out(batch, self.group.size, self._max_tokens, shares=False)
            args = [([batch.select(rows) for rows in micros],) for micros in plan]
            results = self.group.call_each("teacher_top", args)
        rows = [row for micros in plan for part in micros for row in part]
        pairs = [pair for result in results for pair in result]
        return batch.replace(
            teacher_ids=_gathered(batch, rows, [ids for ids, _ in pairs]),
            teacher_logprobs=_gathered(batch, rows, [logprobs for _, logprobs in pairs]),
        )


class Sampler:
    """The rollout engines: one in each process of their group, or in each `tensor_parallel` of them that follow one
    another. With `apart` some of them prefill for the others."""

    def __init__(
        self,
        group: Any,
        clock: Clock,
        *,
        seed: int,
        decode: Callable[[Sequence[int]], str],
        apart: Apart | None = None,
        tensor_parallel: int = 1,
    ) -> None:
        self.group, self._clock, self._seed, self._decode = group, clock, seed, decode
        self._apart = apart
        self._each = tensor_parallel  # processes of an engine, which are all told the same
        self._engine_stats: list[Mapping[str, float]] = []  # of every call and engine since `take_stats`

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        samples: int,
        purpose: str,
        step: int,
        first: int = 0,
    ) -> list[RolloutGroup]:
        """`samples` responses to each prompt, in the prompts' order. `first` is the number of the first prompt among
        those of the step.

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
            for i, prompt in enumerate(prompts, first)
        ]
        with self._clock.phase("rollout"):
            completions = self._completions(requests)
        self._engine_stats += self.group.call("rollout_stats")[:: self._each]
        return [
            RolloutGroup(prompt, tuple(self._rollout(f"{step}/{i}/{c.index}", prompt, c) for c in group))
            for i, (prompt, group) in enumerate(zip(prompts, completions, strict=True), first)
        ]

    def _completions(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """As [request][sample]."""
        if self._apart is not None:
            return generate_apart(self.group, requests, self._apart)
        engines = self.group.size // self._each
        args = [(requests[e::engines],) for e in range(engines) for _ in range(self._each)]
        results = self.group.call_each("generate", args)[:: self._each]
        return [results[i % engines][i // engines] for i in range(len(requests))]

    def take_stats(self) -> dict[str, float]:
        """What the engines say of their work since the last call; {} if there was none. It depends on how the prompts
        are shared out and on the cache's size, and is no function of the recipe."""
        taken, self._engine_stats = [s for s in self._engine_stats if s["rollout/prefill_tokens"]], []
        if not taken:
            return {}
        prefill = sum(s["rollout/prefill_tokens"] for s in taken)
        found = sum(s["rollout/prefill_tokens"] * s["cache/hit_frac"] for s in taken)
        return {
            "cache/hit_frac": found / prefill,
            "cache/used_frac": max(s["cache/used_frac"] for s in taken),
            **{name: float(sum(s[name] for s in taken)) for name in _SUMMED},
        }

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
