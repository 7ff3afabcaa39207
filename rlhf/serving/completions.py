"""The answers of /v1/completions.

Here: their form, whole and in pieces. Not here: how they come about (`rlhf.serving.generation`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rlhf.rollout.request import TopLogprobs
from rlhf.serving.async_engine import AsyncEngine
from rlhf.serving.bodies import CompletionBody
from rlhf.serving.errors import ApiError
from rlhf.serving.generation import (
    Generation,
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
                max_tokens=body.max_tokens or _MAX_TOKENS,
                top_logprobs=body.logprobs or 0,
                grammar=grammar,
            )
            for prompt in prompts
        ]
        self._prompts = prompts
        self.generation = Generation(engine, served, body, requests_for(body, served, prompts, params))
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        self._offsets = [len(self._echo(i)) for i in range(len(prompts) * body.n)]  # of the next token's text

    async def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(i, self._echo(i) + c.text, c.token_ids, c.logprobs, c.top, c.finish_reason)
            for i, c in enumerate(await self.generation.choices())
        ]
        return {**self._head, "choices": choices, "usage": self.generation.usage}

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        begun: set[int] = set()
        async for pieces in self.generation.pieces():
            events = []
            for p in pieces:
                text = p.text if p.choice in begun else self._echo(p.choice) + p.text
                if (
                    not (text or p.finish_reason or self._body.return_token_ids)
                    and self._body.logprobs is None
                ):
                    continue
                choice = self._choice(p.choice, text, p.token_ids, p.logprobs, p.top, p.finish_reason)
                if p.choice in begun:
                    choice.pop("prompt_token_ids", None)
                begun.add(p.choice)
                events.append({**self._head, "choices": [choice]})
            yield events
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield [{**self._head, "choices": [], "usage": self.generation.usage}]

    def _echo(self, choice: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._prompts[choice // self._body.n]
        return self._served.tokenizer.decode(prompt, skip_special_tokens=self._body.skip_special_tokens)

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        top: Sequence[TopLogprobs],
        finish_reason: str | None,
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if self._body.logprobs is not None:
            choice["logprobs"] = self._logprobs(index, token_ids, logprobs, top)
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = list(self._prompts[index // self._body.n])
            choice["token_ids"] = list(token_ids)
        return choice

    def _logprobs(
        self, index: int, token_ids: Sequence[int], logprobs: Sequence[float], top: Sequence[TopLogprobs]
    ) -> dict[str, Any]:
        texts = self._served.token_texts
        names = [texts.name(token) for token in token_ids]
        offsets, tops = [], []
        for place, token in enumerate(token_ids):
            offsets.append(self._offsets[index])
            self._offsets[index] += len(texts.text(token))
            likeliest = zip(top[place].token_ids, top[place].logprobs) if top else ()
            entry = {texts.name(t): as_json_number(p) for t, p in likeliest}
            entry.setdefault(names[place], as_json_number(logprobs[place]))
            tops.append(entry)
        return {
            "tokens": names,
            "token_logprobs": [as_json_number(p) for p in logprobs],
            "top_logprobs": tops if self._body.logprobs else None,
            "text_offset": offsets,
        }


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
