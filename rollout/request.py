"""What goes into the engine and what comes out: SamplingParams, Request, Completion, and the engine's own
settings.

Tokens in, tokens out. Not here: text, rewards, and the run's records (`rlhf.records`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rlhf.rollout.policies import ORDERS, Policy

FinishReason = Literal["stop", "length", "aborted"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the samples of one request are drawn. Raises ValueError for a value out of range."""

    max_tokens: int  # longest response; shorter where the model's context ends
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # sample among the k likeliest; 0 = all
    top_p: float = 1.0  # then among the likeliest that together hold this probability
    stop_ids: tuple[int, ...] = ()  # a response ends with the first of these, which is part of it
    min_tokens: int = 0  # stop_ids cannot be drawn before this many tokens

    def __post_init__(self) -> None:
        if self.max_tokens <= 0:
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no room for a response; use max_tokens >= 1"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} is not a finite number >= 0; use 0 for greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; use 0 to sample among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]; use 1 to sample among all tokens")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is outside 0..max_tokens={self.max_tokens}")


@dataclass(frozen=True)
class Request:
    """One prompt and the samples wanted for it. Raises ValueError for an empty prompt or no seed."""

    id: str  # unique among the requests of one call
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seeds: tuple[int, ...]  # a 63-bit key per sample (`rlhf.rng.key`), which decides its draws
    priority: int = 0  # for policy "priority": the greatest is admitted first
    tenant: str = ""  # for policy "fair": whose request it is
    stream: bool = False  # be told of every token, by `Engine.step`
    begun: tuple[Completion, ...] = ()  # what an aborted call had written, one per sample, to go on from

    def __post_init__(self) -> None:
        if self.begun and len(self.begun) != len(self.seeds):
            raise ValueError(
                f"request {self.id!r} goes on from {len(self.begun)} samples and has {len(self.seeds)} seeds; give the "
                "seeds it had"
            )
        if not self.prompt_ids:
            raise ValueError(
                f"request {self.id!r} has an empty prompt; give it at least one token, such as BOS"
            )
        if not self.seeds:
            raise ValueError(f"request {self.id!r} has no seeds; give one per sample")
        bad = [s for s in self.seeds if not 0 <= s < 1 << 63]
        if bad:
            raise ValueError(f"request {self.id!r}: seed {bad[0]} is not a 63-bit key; use rlhf.rng.key(...)")


@dataclass(frozen=True)
class Completion:
    """One sampled response; the per-token tuples have one entry per token of `token_ids`."""

    request_id: str
    index: int  # which of the request's samples
    token_ids: tuple[int, ...]  # the stop token included
    logprobs: tuple[float, ...]  # nats, fp32: the policy's own at the sampling temperature (T = 1 for greedy)
    processed_logprobs: tuple[float, ...]  # nats, fp32: under the distribution drawn from
    policy_versions: tuple[int, ...]  # optimiser steps in the weights that wrote each token
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of the engine; no value changes any result. Defaults are the recipe's (`rollout` section)."""

    page_tokens: int  # tokens in one page of the key/value cache
    max_batch_tokens: int  # tokens in one forward pass, prefill and decode together
    max_sequences: int  # sequences decoded at the same time
    prefix_cache: bool  # keep the pages of finished prompts and use them again under the same weights
    cache_tokens: int | None = None  # size of the cache; None = what a call needs, within free memory
    policy: Policy = "fcfs"  # who of the waiting is admitted next
    preemption: Literal["recompute", "swap"] = (
        "recompute"  # of work that gives way: its keys made again, or put by
    )
    cache_responses: bool = (
        False  # find the text of a finished response again too, as the next turn of a chat does
    )

    def __post_init__(self) -> None:
        for name in ("page_tokens", "max_batch_tokens", "max_sequences"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.policy not in ORDERS:
            raise ValueError(f"policy={self.policy!r} is unknown; choose from {', '.join(ORDERS)}")
        if self.cache_tokens is not None and self.cache_tokens < self.page_tokens:
            raise ValueError(
                f"cache_tokens={self.cache_tokens} is less than one page of {self.page_tokens} tokens; "
                "raise it or leave it out"
            )


@dataclass(frozen=True)
class Delta:
    """What one sample of a streamed request wrote since the last update; fields as in Completion."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    processed_logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    finish_reason: FinishReason | None  # None: more will come


@dataclass(frozen=True)
class Update:
    """News of one request after a step."""

    request_id: str
    deltas: tuple[Delta, ...]  # of a request with `stream`, else none
    completions: tuple[Completion, ...] | None  # all its samples, once all have finished
