"""Prompts that one engine prefills and another goes on from: what is handed over, and what is checked before it is used.

`Engine.prefill` makes `PromptPages`; `Engine.add` and `Engine.generate` take them (`pages=`) and put them into their own
cache when the request's turn comes, as if its prefix had been found there. They hold the keys and values of all tokens
of a prompt but the last: the logits of that one decide the first draws, so it is run where those are made. Bytes are
kept by token and not by page, so that the two engines may have pages of other sizes. They are in host memory, also where
they come from a GPU. Not here: how they reach another process (`rlhf.trainers.handover`), and when they are put into the
cache (`rlhf.rollout.scheduler`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch

from rlhf.models.adapters import Adapter
from rlhf.rollout.request import PromptLogprobs, Request, SamplingParams


class PagesError(ValueError):
    """Pages that the engine, or the request, is not the right one for."""


@dataclass(frozen=True)
class PageKind:
    """What decides the numbers in pages, beside the tokens: equal in the engine that made them and the one that uses them."""

    version: int  # optimiser steps in the weights
    layers: tuple[tuple[int, int], ...]  # key heads and their size, of each layer
    kv_dtype: torch.dtype  # of keys and values
    weights: str  # as in EngineConfig
    adapter: str = ""  # name; "" = the model as it is
    adapter_checksum: int = 0  # of its weights


_KINDS = {  # how an error names them
    "version": "weight version",
    "layers": "(key heads, head size) by layer",
    "kv_dtype": "cache numbers",
    "weights": "weights in the form",
    "adapter": "adapter",
    "adapter_checksum": "adapter weights with checksum",
}


@dataclass(frozen=True, eq=False)
class PromptPages:
    """Keys and values of a prompt's tokens but the last."""

    prompt_ids: tuple[int, ...]
    kind: PageKind
    data: torch.Tensor  # (num_tokens * bytes of a token,) uint8 in host memory: what `KVPages.read` gives
    checksum: int  # CRC-32 of data
    scored_with: tuple[int, float] | None = None  # likeliest tokens and temperature of `scores`
    scores: PromptLogprobs | None = None  # of the prompt, where the request asked for them

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) - 1


def prompt_pages(
    request: Request, kind: PageKind, data: torch.Tensor, scores: PromptLogprobs | None
) -> PromptPages:
    """What an engine of that kind hands over of a request's prompt."""
    return PromptPages(request.prompt_ids, kind, data, checksum(data), _scored_with(request.params), scores)


def check_pages(request: Request, pages: PromptPages, kind: PageKind) -> None:
    """Raise PagesError unless an engine of that kind may go on from pages for the request."""
    for name, noun in _KINDS.items():
        theirs, ours = getattr(pages.kind, name), getattr(kind, name)
        if theirs != ours:
            raise PagesError(
                f"request {request.id!r}: pages of {noun} {theirs!r} in an engine of {noun} {ours!r}; prefill its prompt by "
                "an engine like this one"
            )
    if pages.prompt_ids != request.prompt_ids:
        raise PagesError(
            f"request {request.id!r} has a prompt of {len(request.prompt_ids)} tokens, and its pages are of another one of "
            f"{len(pages.prompt_ids)}; give pages in the order of the requests"
        )
    wanted = _scored_with(request.params)
    if wanted is not None and pages.scored_with != wanted:
        raise PagesError(
            f"request {request.id!r} wants log-probs of its prompt with {wanted[0]} likeliest tokens at temperature "
            f"{wanted[1]:g}, and its pages came with {pages.scored_with}; prefill the same request"
        )
    found = checksum(pages.data)
    if found != pages.checksum:
        raise PagesError(
            f"request {request.id!r}: its pages have checksum {found:08x} and were made with {pages.checksum:08x}; they were "
            "damaged on the way: prefill its prompt again"
        )


def without_last_token(request: Request) -> Request:
    """A request of the engine's own that fills the cache with what is handed over; its one draw is thrown away."""
    draw = SamplingParams(max_tokens=1, temperature=0.0)
    return replace(
        request, prompt_ids=request.prompt_ids[:-1], params=draw, seeds=(0,), stream=False, begun=()
    )


def adapter_checksum(adapter: Adapter) -> int:
    total = 0
    for name, part in sorted(adapter.parts.items()):
        total = zlib.crc32(f"{name} {part.scale}".encode(), total)
        for tensor in (part.a, part.b):
            total = checksum(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8), total)
    return total


def checksum(data: torch.Tensor, start: int = 0) -> int:
    """CRC-32 of (n,) uint8 in host memory, going on from `start`."""
    return zlib.crc32(data.numpy(), start)


def _scored_with(params: SamplingParams) -> tuple[int, float] | None:
    if params.prompt_logprobs is None:
        return None
    return params.prompt_logprobs, params.temperature or 1.0
