"""Answers to many prompts at once. Not here: files (`rlhf.serving.rows`), requests that come and go
(`rlhf.serving.async_engine`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from rlhf.rollout import Completion, Request
from rlhf.serving.bodies import ChatBody, CompletionBody, Sampling
from rlhf.serving.chat import chat_prompt
from rlhf.serving.completions import completion_prompts
from rlhf.serving.errors import ApiError, as_api_error
from rlhf.serving.generation import new_request, sampling_params
from rlhf.serving.model import Served, load_served, sample_seeds
from rlhf.serving.settings import EngineSettings, NotStarted
from rlhf.serving.text import SampleText


def answers(
    settings: EngineSettings, rows: Sequence[dict[str, Any]], *, chat: bool, wishes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each row with `responses` and `finish_reasons`. `wishes` are fields of a completion's body. Of the settings' adapters the
    first one answers, or the one that a row names as its `adapter`, "" for the model itself.

    With a seed every row draws with noise of its own. Raises NotStarted, naming the row, before any work.
    """
    bodies = [_body(number, row, chat, wishes) for number, row in enumerate(rows, 1)]
    adapters = [_adapter(number, row, list(settings.adapters)) for number, row in enumerate(rows, 1)]
    served = load_served(settings, settings.model)
    seed = sample_seeds(wishes["seed"], 1)[0]
    requests = [
        _request(number, body, served, seed, adapter)
        for number, (body, adapter) in enumerate(zip(bodies, adapters, strict=True), 1)
    ]
    shown = _Progress(sum(body.n for body in bodies))
    found = served.engine.generate(requests, on_progress=shown)
    shown.end()
    return [
        {
            **row,
            "responses": [_text(c, request, served) for c in completions],
            "finish_reasons": [c.finish_reason for c in completions],
        }
        for row, request, completions in zip(rows, requests, found, strict=True)
    ]


def _body(number: int, row: dict[str, Any], chat: bool, wishes: dict[str, Any]) -> Sampling:
    try:
        if "messages" in row:
            return ChatBody.model_validate({**wishes, "messages": row["messages"]})
        if chat:
            return ChatBody.model_validate(
                {**wishes, "messages": [{"role": "user", "content": row["prompt"]}]}
            )
        return CompletionBody.model_validate({**wishes, "prompt": row["prompt"]})
    except ValidationError as error:
        raise _named(number, error) from None


def _adapter(number: int, row: dict[str, Any], names: Sequence[str]) -> str:
    if "adapter" not in row:
        return names[0] if names else ""
    if row["adapter"] not in ("", *names):
        raise NotStarted(
            f"prompt {number}: the adapter {row['adapter']!r} is not here (--adapter NAME=FOLDER); there are: {', '.join(names) or 'none'}"
        )
    return row["adapter"]


def _request(number: int, body: Sampling, served: Served, seed: int, adapter: str) -> Request:
    try:
        if isinstance(body, ChatBody):
            prompt = chat_prompt(served.tokenizer, body.messages)
        else:
            assert isinstance(body, CompletionBody)
            (prompt,) = completion_prompts(body, served)
        params = sampling_params(
            body,
            served,
            num_prompt=len(prompt),
            max_tokens=body.max_tokens,
            top_logprobs=0,
            grammar=None,
        )
    except (ApiError, ValueError) as error:
        raise _named(number, error) from None
    return new_request(body, prompt, params, sample_seeds(seed + number - 1, body.n), adapter)


def _named(number: int, error: Exception) -> NotStarted:
    found = as_api_error(error)
    return NotStarted(f"prompt {number}: {error if found is None else found.message}")


def _text(completion: Completion, request: Request, served: Served) -> str:
    text = SampleText(served.tokenizer, stop_ids=request.params.stop_ids, stops=request.params.stop)
    return text.push(completion.token_ids, completion.finish_reason)


class _Progress:
    """A line on stderr that counts, where that is a terminal."""

    def __init__(self, total: int) -> None:
        self._is_shown = sys.stderr.isatty() and total > 1

    def __call__(self, finished: int, total: int) -> None:
        if self._is_shown:
            sys.stderr.write(f"\r{finished} of {total} answers")
            sys.stderr.flush()

    def end(self) -> None:
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")
