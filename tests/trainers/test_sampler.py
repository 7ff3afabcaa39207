"""What the engines say of their work, summed up for one record."""

from __future__ import annotations

import pytest

from rlhf.records import Prompt
from rlhf.rollout import Completion, SamplingParams
from rlhf.trainers.roles import Clock, Sampler


class _Engines:
    """Two engines; each answers every request with one token, and has found a share of the prompts in its cache."""

    size = 2
    hit = (0.5, 0.0)

    def call_each(self, method, args_per_rank):
        assert method == "generate"
        self.tokens = [sum(len(r.prompt_ids) for r in requests) for (requests,) in args_per_rank]
        answer = Completion("0", 0, (5,), (-1.0,), (-1.0,), (0,), "stop")
        return [[[answer] for _ in requests] for (requests,) in args_per_rank]

    def call(self, method):
        assert method == "rollout_stats"
        return [
            {
                "cache/hit_frac": hit,
                "cache/used_frac": 0.25 + hit,
                "rollout/prefill_tokens": tokens,
                "rollout/handed_tokens": 0,
                "rollout/preempted": 1,
                "rollout/forward_passes": 3,
                "rollout/drafted_tokens": 4,
                "rollout/accepted_tokens": 2,
            }
            for hit, tokens in zip(self.hit, self.tokens, strict=True)
        ]


class _Split(_Engines):
    """Four processes, two to an engine; each tells of itself in what it answers."""

    size = 4
    hit = (0.5, 0.5, 0.0, 0.0)

    def call_each(self, method, args_per_rank):
        self.given = [[r.id for r in requests] for (requests,) in args_per_rank]
        super().call_each(method, args_per_rank)
        return [
            [[Completion(r.id, 0, (rank,), (-1.0,), (-1.0,), (0,), "stop")] for r in requests]
            for rank, (requests,) in enumerate(args_per_rank)
        ]


def test_processes_of_one_engine_are_told_the_same() -> None:
    """Would catch: a request that only one of an engine's processes gets, answers that are taken twice or of another prompt,
    and work that is counted once for each process."""
    group = _Split()
    sampler = Sampler(group, Clock(), seed=0, decode=str, tensor_parallel=2)
    prompts = [Prompt(f"p{i}", (1,), "p") for i in range(3)]
    params = SamplingParams(max_tokens=1, stop_ids=(0,))
    groups = sampler.generate(prompts, params, samples=1, purpose="rollout", step=0)
    assert group.given == [["0/0", "0/2"]] * 2 + [["0/1"]] * 2
    assert [g.rollouts[0].response_ids for g in groups] == [(0,), (2,), (0,)]
    assert sampler.take_stats()["rollout/forward_passes"] == 6


def test_stats_of_all_calls_and_engines_are_one() -> None:
    """Would catch: the last call's numbers for those of the step; a mean of shares that forgets what they are of; an
    engine without a prompt that counts as one that found nothing."""
    sampler = Sampler(_Engines(), Clock(), seed=0, decode=str)
    assert sampler.take_stats() == {}
    prompts = [Prompt(f"p{i}", (1,) * (i + 1), "p") for i in range(3)]  # the engines get 4 and 2 tokens
    params = SamplingParams(max_tokens=1, stop_ids=(0,))
    for rows in (prompts, prompts[:1]):
        sampler.generate(rows, params, samples=1, purpose="rollout", step=0)
    assert sampler.take_stats() == {
        "cache/hit_frac": pytest.approx((4 * 0.5 + 1 * 0.5) / 7),
        "cache/used_frac": 0.75,
        "rollout/handed_tokens": 0,
        "rollout/preempted": 3,
        "rollout/forward_passes": 9,
        "rollout/drafted_tokens": 12,
        "rollout/accepted_tokens": 6,
    }
    assert sampler.take_stats() == {}
