"""The answers of /v1/completions.

Here: their form, whole and in pieces. Not here: how they come about (`rlhf.serving.generation`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from rlhf.rollout.request import TopLogprobs
from rlhf.serving.async_engine import AsyncEngine
from rlhf.serving.bodies import CompletionBody
from rlhf.serving.errors import ApiError
from rlhf.serving.generation import (
    Generation,
    Piece,
    as_json_number,
    asked_grammar,
    check_fits,
    check_length,
    requests_for,
    sampling_params,
)
from rlhf.serving.model import Served

_MAX_TOKENS = 16  # OpenAI's default


class Completions:
    """One call. `begin`, then `whole` or `events`, and `close` in any case."""

    def __init__(self, body: CompletionBody, served: Served, engine: AsyncEngine) -> None:
        self._body, self._served = body, served
        self.is_streaming = body.stream
        prompts = completion_prompts(body, served)
        check_fits(served, engine, body, len(prompts))
        grammar = asked_grammar(body, body.response_format)
        params = [
            sampling_params(
                body,
                served,
                num_prompt=len(prompt),
                max_tokens=_MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1),
                top_logprobs=body.logprobs or 0,
                grammar=grammar,
                prompt_logprobs=body.logprobs if body.echo else None,
            )
            for prompt in prompts
        ]
        self._prompts = prompts
        self.generation = Generation(engine, served, body, requests_for(body, served, prompts, params))
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or served.name,
        }
        self._special = frozenset(served.tokenizer.all_special_ids)
        self._offsets = [0] * (len(prompts) * body.n)  # of the next token's text

    async def whole(self) -> dict[str, Any]:
        choices = [self._choice(c.as_piece(i), True) for i, c in enumerate(await self.generation.choices())]
        return {**self._head, "choices": choices, "usage": self._usage}

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        begun: set[int] = set()
        async for pieces in self.generation.pieces():
            events = []
            for p in pieces:
                choice = self._choice(p, p.choice not in begun)
                if not (
                    choice["text"] or p.finish_reason or self._body.return_token_ids or choice["logprobs"]
                ):
                    continue
                begun.add(p.choice)
                events.append({**self._head, "choices": [choice]})
            yield events
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield [{**self._head, "choices": [], "usage": self._usage}]

    @property
    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage
        if self._body.max_tokens == 0:  # the token that the engine draws at least is nobody's
            return usage | {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _echo(self, choice: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._prompts[choice // self._body.n]
        return self._served.tokenizer.decode(prompt, skip_special_tokens=self._body.skip_special_tokens)

    def _choice(self, piece: Piece, is_first: bool) -> dict[str, Any]:
        index = piece.choice
        if self._body.max_tokens == 0:
            piece = replace(
                piece,
                text="",
                token_ids=(),
                logprobs=(),
                top=(),
                finish_reason=piece.finish_reason and "length",
            )
        echo = self._echo(index) if is_first else ""
        choice = {
            "index": index,
            "text": echo + piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if self._body.logprobs is not None:
            choice["logprobs"] = self._logprobs(piece, is_first and self._body.echo)
        if self._body.return_token_ids:
            if is_first:
                choice["prompt_token_ids"] = list(self._prompts[index // self._body.n])
            choice["token_ids"] = list(piece.token_ids)
        return choice

    def _logprobs(self, piece: Piece, with_prompt: bool) -> dict[str, Any]:
        entries = [
            (token, as_json_number(p), top)
            for token, p, top in zip_longest(piece.token_ids, piece.logprobs, piece.top)
        ]
        if with_prompt:
            entries[:0] = self._prompt_entries(piece)
        texts, named, tops, offsets = self._served.token_texts, [], [], []
        for token, logprob, top in entries:
            name = texts.name(token)
            named.append(name)
            offsets.append(self._offsets[piece.choice])
            self._offsets[piece.choice] += 0 if self._is_unseen(token) else len(texts.text(token))
            likeliest = () if top is None else zip(top.token_ids, top.logprobs, strict=True)
            tops.append({texts.name(t): as_json_number(p) for t, p in likeliest})
            tops[-1].setdefault(name, logprob)
        if with_prompt:
            tops[0] = None
        return {
            "tokens": named,
            "token_logprobs": [logprob for _, logprob, _ in entries],
            "top_logprobs": tops if self._body.logprobs else None,
            "text_offset": offsets,
        }

    def _prompt_entries(self, piece: Piece) -> list[tuple[int, float | None, TopLogprobs | None]]:
        """Of the prompt's tokens; the first has no log-prob."""
        assert piece.prompt is not None, "they were asked for, and come with the first piece"
        first, *others = self._prompts[piece.choice // self._body.n]
        rest = zip_longest(others, map(as_json_number, piece.prompt.logprobs), piece.prompt.top_logprobs)
        return [(first, None, None), *rest]

    def _is_unseen(self, token: int) -> bool:
        return self._body.skip_special_tokens and token in self._special


def completion_prompts(body: CompletionBody, served: Served) -> list[list[int]]:
    """The prompts as tokens."""
    given = body.prompt
    if isinstance(given, str):
        texts = [given]
    elif not given:
        raise ApiError("prompt is empty; give a text or tokens", param="prompt")
    elif isinstance(given[0], int):
        return [_checked([t for t in given if isinstance(t, int)], served)]
    elif isinstance(given[0], list):
        return [_checked(ids, served) for ids in given if isinstance(ids, list)]
    else:
        texts = [text for text in given if isinstance(text, str)]
    check_length(served, *texts)
    found = served.tokenizer(texts, add_special_tokens=body.add_special_tokens, verbose=False)["input_ids"]
    return [_checked(list(ids), served) for ids in found]


def _checked(ids: list[int], served: Served) -> list[int]:
    if not ids:
        raise ApiError("the prompt has no tokens; give a text or tokens", param="prompt")
    bad = [token for token in ids if token >= served.vocab]
    if bad:
        raise ApiError(f"prompt: {bad[0]} is no token; the model knows {served.vocab}", param="prompt")
    return ids
