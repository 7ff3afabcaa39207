"""Chat messages: what is refused, and which of the text that a chat template writes is the assistant's.

Here: messages in, texts out. Not here: tokens, and rows that hold messages (`rlhf.data.rows`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]

_ROLES = ("system", "user", "assistant", "tool")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template says itself which text is the assistant's
_SHOWN = 40  # characters on each side of the place where two texts part


class Refused(Exception):
    """This row cannot be used; the text says why. Never leaves `rlhf.data`."""


# -- checks ----------------------------------------------------------------------------------------


def prompt_messages(prompt: Any, system_prompt: str | None) -> list[Message]:
    """A prompt, text or messages, as messages of which the last asks for an answer. Raises Refused."""
    messages = _checked(
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "the prompt"
    )
    if messages[-1]["role"] not in ("user", "tool"):
        raise Refused(f"the last message is the {messages[-1]['role']}'s; there is nothing to answer")
    if not messages[-1]["content"].strip():
        raise Refused("the prompt is empty")
    return _with_system(messages, system_prompt)


def conversation_messages(conversation: Any, system_prompt: str | None) -> list[Message]:
    """A whole conversation, from the user's first message to the assistant's last. Raises Refused."""
    messages = _with_system(_checked(conversation, "the conversation"), system_prompt)
    first = next((m["role"] for m in messages if m["role"] != "system"), None)
    if first != "user":
        raise Refused(f"the conversation begins with the {first}'s message; it must begin with the user's")
    if messages[-1]["role"] != "assistant":
        raise Refused(f"the last message is the {messages[-1]['role']}'s; there is no answer to it")
    for message in messages:
        if message["role"] == "assistant":
            _check_answer(message)
    return messages


def answer_message(value: Any, what: str) -> Message:
    """A response as one message of the assistant. Raises Refused."""
    messages = _checked(value, what)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(m["role"] for m in messages)
        raise Refused(f"{what} is messages of {roles}; it must be text or one message of the assistant")
    _check_answer(messages[0])
    return messages[0]


def _check_answer(message: Message) -> None:
    if not message["content"].strip():
        raise Refused("a message of the assistant is empty")


def _checked(messages: Any, what: str) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise Refused(f"{what} is {messages!r:.80}, neither text nor a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise Refused(f"the message {message!r:.80} is not {{role, content}} with text in it")
        if message.get("role") not in _ROLES:
            raise Refused(
                f"the message's role is {message.get('role')!r}; it must be one of {', '.join(_ROLES)}"
            )
    if any(m["role"] == "system" for m in messages[1:]):
        raise Refused("a system message comes after the first message")
    for a, b in pairwise(messages):
        if a["role"] == b["role"] != "tool":  # several tools may answer one call
            raise Refused(f"two messages of the {a['role']} follow each other; join them")
    return [dict(m) for m in messages]


def _with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    if system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise Refused("it has a system message of its own beside data.system_prompt")
    return [{"role": "system", "content": system_prompt}, *messages]


# -- texts -----------------------------------------------------------------------------------------


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The messages and the beginning of the assistant's turn. Raises Refused where the template does."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def render_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """What the template writes for the last message after the prompt of `render_prompt`, up to the end of the turn.

    Raises ValueError if the template changes the prompt when the answer follows.
    """
    whole = _render(tokenizer, messages)
    start, end = _turn(tokenizer, messages, len(messages) - 1, whole)
    return whole[start:end]


def render_turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[str]:
    """The conversation as texts in turn: read, learned, read, learned, ... What is learned is the assistant's.

    A template's own `{% generation %}` marks say which text that is; without them it is what the template adds for
    each message of the assistant, up to the special token that ends the turn. Raises Refused where the template
    does or where it marks nothing, ValueError for a template without marks that changes earlier turns when later
    ones follow.
    """
    if _MARK.search(tokenizer.get_chat_template()):
        text, spans = _marked(tokenizer, messages)
    else:
        text = _render(tokenizer, messages)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        spans = [_turn(tokenizer, messages, i, text) for i in answers]
    if not any(end > start for start, end in spans):
        raise Refused("the chat template marks no text as the assistant's, so there is no token to learn")
    pieces, position = [], 0
    for start, end in spans:
        pieces += [text[position:start], text[start:end]]
        position = end
    return pieces


def _turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, whole: str
) -> tuple[int, int]:
    """Where the text of the message begins and ends in that of the whole conversation."""
    before = render_prompt(tokenizer, messages[:index])
    after = _render(tokenizer, messages[: index + 1])
    for prefix, upto in ((before, index), (after, index + 1)):
        if not whole.startswith(prefix):
            raise ValueError(_not_prefix_preserving(prefix, whole, upto))
    return len(before), max(len(before), _turn_end(tokenizer, after, len(after)))


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
    try:
        texts, spans = render_jinja_template(
            [list(messages)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        raise Refused(f"the chat template refuses it: {error}") from None
    return texts[0], [(start, _turn_end(tokenizer, texts[0], end)) for start, end in spans[0]]


def _turn_end(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> int:
    """`end` without the white space after a special token: generation stops there and never writes it."""
    bare = text[:end].rstrip()
    return len(bare) if bare.endswith(tuple(tokenizer.all_special_tokens)) else end


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise Refused(f"the chat template refuses it: {error}") from None


def _not_prefix_preserving(prefix: str, whole: str, upto: int) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), len(whole))
    near = slice(max(0, at - _SHOWN), at + _SHOWN)
    return (
        f"the chat template changes the first {upto} messages when others follow, so the assistant's text cannot be "
        f"told apart: alone they end in {prefix[near]!r}, in the whole conversation there is {whole[near]!r}. Use a "
        "template with {% generation %} marks around the assistant's turns, or a row for each answer "
        "(data.prompt_column and data.response_column)"
    )
