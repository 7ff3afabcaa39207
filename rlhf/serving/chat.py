"""The answers of /v1/chat/completions.

Here: messages to a prompt, by the tokenizer's chat template; the form of the answers, whole and in pieces. Not here: how
they come about (`rlhf.serving.generation`), what a call of a tool looks like (`rlhf.serving.tools`).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf.rollout.request import TopLogprobs
from rlhf.serving.async_engine import AsyncEngine
from rlhf.serving.bodies import ChatBody, Message, Tool
from rlhf.serving.errors import ApiError
from rlhf.serving.generation import (
    Choice,
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
from rlhf.serving.tools import CallNews, ToolParser, call_grammar


class Chat:
    """One call. `begin`, then `whole` or `events`, and `close` in any case."""

    def __init__(self, body: ChatBody, served: Served, engine: AsyncEngine) -> None:
        self._body, self._served = body, served
        self.is_streaming = body.stream
        check_fits(served, engine, body, 1)
        check_length(served, *(message.text for message in body.messages))
        prompt = chat_prompt(
            served.tokenizer,
            body.messages,
            body.shown_tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **body.chat_template_kwargs,
        )
        grammar, forced = asked_grammar(body, body.response_format), body.forced_tools
        if forced:
            if grammar is not None:
                raise ApiError("a forced tool_choice and a grammar exclude each other; leave one of them out")
            grammar = call_grammar(forced, several=body.parallel_tool_calls and len(body.tools) == len(forced))  # fmt: skip
        params = sampling_params(
            body,
            served,
            num_prompt=len(prompt),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            top_logprobs=body.top_logprobs,
            grammar=grammar,
        )
        self._prompt = prompt
        self.generation = Generation(engine, served, body, requests_for(body, served, [prompt], [params]))
        names = [tool.function.name for tool in body.shown_tools]
        self._parsers = [ToolParser(names) for _ in range(body.n)] if names else None
        self._has_calls = [False] * body.n
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model or served.name,
        }

    async def whole(self) -> dict[str, Any]:
        choices = [self._choice(i, c) for i, c in enumerate(await self.generation.choices())]
        return {**self._head, "choices": choices, "usage": self.generation.usage}

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        first = {"role": "assistant", "content": ""}
        yield [self._event(index, dict(first), None) for index in range(self._body.n)]
        async for pieces in self.generation.pieces():
            yield [event for piece in pieces for event in self._events(piece)]
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield [{**self._head, "choices": [], "usage": self.generation.usage}]

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._parsers is not None:
            found = self._parsers[index].push(choice.text, is_over=True)
            if found.calls:
                message["content"] = found.content or None
                message["tool_calls"] = [_as_json(call) for call in found.calls]
                self._has_calls[index] = True
        answer: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.token_ids, choice.logprobs, choice.top),
            "finish_reason": self._reason(index, choice.finish_reason),
        }
        if self._body.return_token_ids:
            answer |= {"prompt_token_ids": list(self._prompt), "token_ids": choice.token_ids}
        return answer

    def _events(self, piece: Piece) -> list[dict[str, Any]]:
        """The news of one choice; none where all its text is held back and nothing else was asked for."""
        index, is_over = piece.choice, piece.finish_reason is not None
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if self._parsers is not None:
            found = self._parsers[index].push(piece.text, is_over=is_over)
            delta = {"content": found.content} if found.content else {}
            if found.calls:
                delta["tool_calls"] = [{"index": call.number, **_as_json(call)} for call in found.calls]
                self._has_calls[index] = True
        logprobs = self._logprobs(piece.token_ids, piece.logprobs, piece.top)
        if not (delta or is_over or logprobs is not None or self._body.return_token_ids):
            return []
        event = self._event(index, delta, self._reason(index, piece.finish_reason), logprobs)
        if self._body.return_token_ids:
            event["choices"][0]["token_ids"] = list(piece.token_ids)
        return [event]

    def _event(
        self, index: int, delta: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice]}

    def _reason(self, index: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._has_calls[index] else reason

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[float], top: Sequence[TopLogprobs]
    ) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        content = []
        for place, (token, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            likeliest = zip(top[place].token_ids, top[place].logprobs) if top else ()
            content.append(
                {**self._token(token, logprob), "top_logprobs": [self._token(t, p) for t, p in likeliest]}
            )
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        texts = self._served.token_texts
        return {
            "token": texts.name(token),
            "logprob": as_json_number(logprob),
            "bytes": list(texts.bytes(token)),
        }


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **template_arguments: Any,
) -> list[int]:
    """The conversation as tokens. Raises ApiError where there is no template, or it refuses the messages."""
    if not tokenizer.chat_template:
        raise ApiError(
            "the model's tokenizer has no chat template; use completions instead", code="no_template"
        )
    reserved = {"conversation", "chat_template", "tokenize", "return_dict", "tokenizer_kwargs"} & set(
        template_arguments
    )
    if reserved:
        raise ApiError(f"chat_template_kwargs: {sorted(reserved)[0]} cannot be set", param="chat_template_kwargs")  # fmt: skip
    shown = [tool.model_dump(exclude_none=True) for tool in tools] or None
    try:
        text = tokenizer.apply_chat_template(
            [_for_template(message) for message in messages],
            tools=shown,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_arguments,
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ApiError(f"the chat template refuses the messages: {error}", param="messages") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ApiError("the messages have no tokens", param="messages")
    return list(ids)


def _for_template(message: Message) -> dict[str, Any]:
    """As templates expect it: arguments of calls as objects, the developer as the system."""
    role = "system" if message.role == "developer" else message.role
    shown: dict[str, Any] = {"role": role, "content": message.text}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            shown[name] = getattr(message, name)
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return shown


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ApiError(
            f"the arguments of a tool call in the messages are no JSON: {error}", param="messages"
        ) from error


def _as_json(call: CallNews) -> dict[str, Any]:
    """What goes on has neither id nor name: clients add its arguments to those they have."""
    if call.name is None:
        return {"function": {"arguments": call.arguments}}
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
