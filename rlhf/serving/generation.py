"""From a body to requests for the engine, and their news as pieces of text.

Here: what completions and chats share. Not here: the forms of the answers (`rlhf.serving.completions`,
`rlhf.serving.chat`).
"""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rlhf.rollout import Delta, Grammar, Request, SamplingParams
from rlhf.rollout.request import MOST_TOP_LOGPROBS, PromptLogprobs, TopLogprobs
from rlhf.serving.async_engine import AsyncEngine, Stream
from rlhf.serving.bodies import ResponseFormat, Sampling
from rlhf.serving.errors import ApiError
from rlhf.serving.model import Served, sample_seeds
from rlhf.serving.text import SampleText
from rlhf.serving.tools import choice_grammar

_LEAST_TEMPERATURE, _LEAST_PENALTY = 1e-4, 0.01  # logits stay finite
_IMPOSSIBLE = -9999.0  # what OpenAI's API says for a log-prob of -inf, which JSON cannot hold


@dataclass(frozen=True)
class Piece:
    """What came of one choice since the last piece."""

    choice: int  # number of the prompt times n, plus that of the sample
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[TopLogprobs, ...]
    finish_reason: str | None
    prompt: PromptLogprobs | None = None  # with the first piece, where asked for


@dataclass
class Choice:
    """All pieces of one, joined."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    prompt: PromptLogprobs | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.top += piece.top
        self.finish_reason = piece.finish_reason
        self.prompt = self.prompt or piece.prompt

    def as_piece(self, choice: int) -> Piece:
        columns = (tuple(self.token_ids), tuple(self.logprobs), tuple(self.top))
        return Piece(choice, self.text, *columns, self.finish_reason, self.prompt)


def sampling_params(
    body: Sampling,
    served: Served,
    *,
    num_prompt: int,
    max_tokens: int | None,
    top_logprobs: int,
    grammar: Grammar | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Raises ApiError, and ValueError as SamplingParams does."""
    room = served.most_tokens - num_prompt
    if room < 1 or (max_tokens or 1) > room:
        asked = f" and {max_tokens} for the answer" if max_tokens else " and 1 at least for the answer"
        raise ApiError(
            f"there is room for {served.most_tokens} tokens; the prompt has {num_prompt}{asked}; shorten the prompt or "
            "lower max_tokens",
            param="max_tokens" if room >= 1 else None,
            code="context_length_exceeded",
        )
    for name, ids in (
        ("stop_token_ids", body.stop_token_ids),
        ("allowed_token_ids", body.allowed_token_ids or ()),
        ("logit_bias", tuple(body.logit_bias)),
    ):
        bad = [token for token in ids if not 0 <= token < served.vocab]
        if bad:
            raise ApiError(f"{name}: {bad[0]} is no token; the model knows {served.vocab}", param=name)
    if top_logprobs > MOST_TOP_LOGPROBS:
        raise ApiError(
            f"{top_logprobs} log-probs beside each token were asked for; there are {MOST_TOP_LOGPROBS} at most",
            param="top_logprobs",
        )
    if grammar is not None and (body.allowed_token_ids is not None or body.min_tokens):
        raise ApiError("an answer held to a grammar can have neither allowed_token_ids nor min_tokens: no token might be left; leave them out")  # fmt: skip
    if 0 < body.temperature < _LEAST_TEMPERATURE:
        raise ApiError(f"temperature={body.temperature} is below {_LEAST_TEMPERATURE}; use 0 for greedy", param="temperature")  # fmt: skip
    if not _LEAST_PENALTY <= body.repetition_penalty <= 1 / _LEAST_PENALTY:
        raise ApiError(f"repetition_penalty={body.repetition_penalty} is outside [{_LEAST_PENALTY}, {1 / _LEAST_PENALTY:g}]; use 1 for none", param="repetition_penalty")  # fmt: skip
    own = () if body.ignore_eos else served.stop_ids
    stop_ids = tuple(dict.fromkeys([*own, *body.stop_token_ids]))
    if (
        body.min_tokens
        and body.allowed_token_ids is not None
        and set(body.allowed_token_ids) <= set(stop_ids)
    ):
        raise ApiError("min_tokens with allowed_token_ids that all end the answer leaves no token; lower min_tokens", param="min_tokens")  # fmt: skip
    return SamplingParams(
        max_tokens=max_tokens or room,
        temperature=body.temperature,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        stop_ids=stop_ids,
        stop=body.stops,
        min_tokens=body.min_tokens,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple(body.logit_bias.items()),
        allowed_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        grammar=grammar,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def check_length(served: Served, *texts: str) -> None:
    """Raise ApiError for a text of which it is clear that it does not fit, before it is cut into tokens."""
    longest = max(map(len, texts))
    if longest > served.most_characters:
        raise ApiError(
            f"the prompt has {longest} characters; there is room for {served.most_tokens} tokens; shorten it",
            code="context_length_exceeded",
        )


def asked_grammar(body: Sampling, form: ResponseFormat | None) -> Grammar | None:
    """The constraint of a body, under whichever name. Raises ApiError for two."""
    found = []
    if form is not None and form.type != "text":
        schema = {"type": "object"} if form.json_schema is None else form.json_schema.schema_
        found.append(Grammar("json_schema", json.dumps(schema)))
    extra = body.structured_outputs
    for schema in (body.guided_json, extra and extra.json_):
        if schema is not None:
            found.append(Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema)))
    for regex in (body.guided_regex, extra and extra.regex):
        if regex is not None:
            found.append(Grammar("regex", regex))
    for choices in (body.guided_choice, extra and extra.choice):
        if choices is not None:
            found.append(choice_grammar(choices))
    for text in (body.guided_grammar, extra and extra.grammar):
        if text is not None:
            found.append(Grammar("lark", text))
    if extra is not None and extra.json_object:
        found.append(Grammar("json_schema", '{"type": "object"}'))
    if len(found) > 1:
        raise ApiError(f"the answer is held to {len(found)} grammars at once; ask for one")
    return found[0] if found else None


def new_request(
    body: Sampling, prompt_ids: Sequence[int], params: SamplingParams, seeds: Sequence[int], adapter: str = ""
) -> Request:
    return Request(
        uuid.uuid4().hex,
        tuple(prompt_ids),
        params,
        tuple(seeds),
        priority=body.priority,
        tenant=body.user,
        stream=True,
        adapter=adapter,
    )


def check_fits(served: Served, engine: AsyncEngine, body: Sampling, num_prompts: int) -> None:
    """Raise ApiError for more samples than the server could ever take at once."""
    if num_prompts * body.n > engine.most_samples:
        raise ApiError(
            f"{num_prompts} prompts with n={body.n} are {num_prompts * body.n} samples; this server takes "
            f"{engine.most_samples} at once; split the request"
        )


def requests_for(
    body: Sampling, served: Served, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[Request]:
    """One for each prompt; with `seed` each prompt's samples are the same wherever it stands."""
    adapter = body.model if body.model in served.engine.adapters else ""
    return [
        new_request(body, prompt, own, sample_seeds(body.seed, body.n), adapter or "")
        for prompt, own in zip(prompts, params, strict=True)
    ]


class Generation:
    """Requests in work, and their news as pieces. Whoever began it closes it."""

    def __init__(
        self, engine: AsyncEngine, served: Served, body: Sampling, requests: Sequence[Request]
    ) -> None:
        self._engine, self._body, self._requests = engine, body, requests
        self._streams: list[Stream] = []
        self._texts = [
            SampleText(
                served.tokenizer,
                stop_ids=request.params.stop_ids,
                stops=request.params.stop,
                skip_special_tokens=body.skip_special_tokens,
                include_stop=body.include_stop_str_in_output,
            )
            for request in requests
            for _ in request.seeds
        ]  # fmt: skip
        self.num_prompt_tokens = sum(len(r.prompt_ids) for r in requests)
        self.num_completion_tokens = 0
        self._cached_tokens = [0] * len(requests)

    @property
    def usage(self) -> dict[str, Any]:
        total = self.num_prompt_tokens + self.num_completion_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }

    async def begin(self) -> None:
        """Submit everything; raises what `AsyncEngine.submit` does, and then nothing of it is in work."""
        try:
            for request in self._requests:
                self._streams.append(await self._engine.submit(request))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take out of work what has not ended."""
        for stream in self._streams:
            self._engine.abort(stream)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """All that came since the last look, until everything has ended."""
        if len(self._streams) == 1:
            async for news in self._streams[0]:
                yield [self._piece(0, delta) for delta in news]
            return
        async with aclosing(_merged(self._streams)) as merged:
            async for number, news in merged:
                yield [self._piece(number, delta) for delta in news]

    async def choices(self) -> list[Choice]:
        """Everything, at the end."""
        found = [Choice() for _ in self._texts]
        async for pieces in self.pieces():
            for piece in pieces:
                found[piece.choice].add(piece)
        return found

    def _piece(self, number: int, delta: Delta) -> Piece:
        choice = number * self._body.n + delta.index
        self.num_completion_tokens += len(delta.token_ids)
        if delta.cached_tokens:  # each of the prompt's samples says it
            self._cached_tokens[number] = delta.cached_tokens
        text = self._texts[choice].push(delta.token_ids, delta.finish_reason)
        news = (delta.token_ids, delta.logprobs, delta.top_logprobs, delta.finish_reason, delta.prompt)
        return Piece(choice, text, *news)


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, list[Delta]]]:
    """The news of all streams with the stream's number; the first error ends it."""
    news: asyncio.Queue[tuple[int, list[Delta] | Exception | None]] = asyncio.Queue()

    async def pump(number: int, stream: Stream) -> None:
        try:
            async for deltas in stream:
                news.put_nowait((number, deltas))
            news.put_nowait((number, None))
        except Exception as error:  # raised again where the news are read
            news.put_nowait((number, error))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        open_streams = len(streams)
        while open_streams:
            number, item = await news.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()


def as_json_number(logprob: float) -> float | None:
    """A log-prob as JSON can hold it; null where the model gave no number."""
    if math.isnan(logprob):
        return None
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE
