"""What goes into the engine and what comes out: SamplingParams, Request, Completion, and the engine's own
settings.

Tokens in, tokens out. Not here: text, rewards, and the run's records (`rlhf.records`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from rlhf.rollout.policies import ORDERS, Policy

MOST_TOP_LOGPROBS = 64
GrammarKind = Literal["json_schema", "regex", "lark"]
FinishReason = Literal["stop", "length", "aborted"]
KvDtype = Literal["auto", "int8", "fp8"]
Weights = Literal["auto", "int8", "int4"]
WEIGHT_BITS = {"int8": 8, "int4": 4}
KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # with a scale for each token and key head


@dataclass(frozen=True)
class Grammar:
    """What a response must be: text that a JSON schema, a regular expression or a Lark grammar describes."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the samples of one request are drawn. Raises ValueError for a value out of range."""

    max_tokens: int  # longest response; shorter where the model's context ends
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # sample among the k likeliest; 0 = all
    top_p: float = 1.0  # then among the likeliest that together hold this probability
    min_p: float = 0.0  # then among those with this share of the likeliest one's probability; 0 = all
    stop_ids: tuple[int, ...] = ()  # a response ends with the first of these, which is part of it
    stop: tuple[str, ...] = ()  # it also ends with the token that completes one of these texts
    min_tokens: int = 0  # stop_ids cannot be drawn, and stop does not count, before this many tokens
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens that were there
    presence_penalty: float = 0.0  # subtracted from logits of tokens that the response has
    frequency_penalty: float = 0.0  # subtracted once for each time that it has them
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    allowed_ids: tuple[int, ...] | None = None  # no others can be drawn
    banned_ids: tuple[int, ...] = ()  # cannot be drawn
    grammar: Grammar | None = None
    top_logprobs: int = 0  # likeliest tokens to report beside each one drawn
    prompt_logprobs: int | None = (
        None  # log-probs of the prompt's tokens, with as many likeliest ones; None = no
    )

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
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is outside [0, 1]; use 0 to sample among all tokens")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is outside 0..max_tokens={self.max_tokens}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} is not a finite number > 0; use 1 for none"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}={getattr(self, name)} is outside [-2, 2]; use 0 for none")
        if not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs={self.top_logprobs} is outside 0..{MOST_TOP_LOGPROBS}")
        if self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= MOST_TOP_LOGPROBS:
            raise ValueError(
                f"prompt_logprobs={self.prompt_logprobs} is outside 0..{MOST_TOP_LOGPROBS}; use None for none"
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which every response contains; leave it out")
        if self.allowed_ids is not None and not set(self.allowed_ids) - set(self.banned_ids):
            raise ValueError(
                f"allowed_ids={list(self.allowed_ids)} less banned_ids={list(self.banned_ids)} leaves no token to draw"
            )
        bad = [bias for _, bias in self.logit_bias if math.isnan(bias) or bias == math.inf]
        if bad:
            raise ValueError(f"logit_bias holds {bad[0]}; biases are numbers or -inf")


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
    adapter: str = ""  # name of one that the engine has; "" = the model as it is
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
    top_logprobs: tuple[TopLogprobs, ...] = ()  # one per token where they were asked for
    prompt: PromptLogprobs | None = None  # where asked for


@dataclass(frozen=True)
class PromptLogprobs:
    """Of a prompt's tokens from the second on."""

    logprobs: tuple[float, ...]  # nats, fp32: as `Completion.logprobs`
    top_logprobs: tuple[TopLogprobs, ...]  # one per token where they were asked for, without processed ones


@dataclass(frozen=True)
class TopLogprobs:
    """The likeliest tokens at one place, likeliest first, and their log-probs, nats, fp32."""

    token_ids: tuple[int, ...]  # under the policy's own distribution
    logprobs: tuple[float, ...]
    processed_ids: tuple[int, ...]  # under the one drawn from; fewer where it has fewer
    processed_logprobs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of the engine; none but kv_dtype and weights changes any result. Defaults are the recipe's (`rollout` section)."""

    page_tokens: int  # tokens in one page of the key/value cache
    max_batch_tokens: int  # tokens in one forward pass, prefill and decode together
    max_sequences: int  # sequences decoded at the same time
    prefix_cache: bool  # keep the pages of finished prompts and use them again under the same weights
    cache_tokens: int | None = None  # size of the cache; None = what a call needs, within free memory
    kv_dtype: KvDtype = (
        "auto"  # numbers of the cache; auto = the model's, of which alone log-probs are the trainer's
    )
    weights: Weights = (
        "auto"  # of the layers' linears: auto = the model's own, else copies made at each version
    )
    policy: Policy = "fcfs"  # who of the waiting is admitted next
    preemption: Literal["recompute", "swap"] = (
        "recompute"  # of work that gives way: its keys made again, or put by
    )
    draft_tokens: int = 0  # most tokens of a sample that are guessed and checked in one pass; 0 = none
    cuda_graphs: bool = True  # on a GPU, run decoding steps as recorded graphs
    cache_responses: bool = (
        False  # find the text of a finished response again too, as the next turn of a chat does
    )

    def __post_init__(self) -> None:
        for name in ("page_tokens", "max_batch_tokens", "max_sequences"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.draft_tokens < 0:
            raise ValueError(f"draft_tokens={self.draft_tokens} is negative; use 0 to guess nothing")
        if self.policy not in ORDERS:
            raise ValueError(f"policy={self.policy!r} is unknown; choose from {', '.join(ORDERS)}")
        if self.kv_dtype not in ("auto", *KV_DTYPES):
            raise ValueError(f"kv_dtype={self.kv_dtype!r} is none of auto, {', '.join(KV_DTYPES)}")
        if self.weights not in ("auto", *WEIGHT_BITS):
            raise ValueError(f"weights={self.weights!r} is none of auto, {', '.join(WEIGHT_BITS)}")
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
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt: PromptLogprobs | None = None  # with the first one
    cached_tokens: int = field(
        default=0, compare=False
    )  # of the prompt, found in the cache; with a sample's first one


@dataclass(frozen=True)
class Update:
    """News of one request after a step."""

    request_id: str
    deltas: tuple[Delta, ...]  # of a request with `stream`, else none
    completions: tuple[Completion, ...] | None  # all its samples, once all have finished
