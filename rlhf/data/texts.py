"""From a row's columns to the texts that will be tokenised: prompts, answers, whole conversations.

Here: what a column may hold and what of it is refused. Not here: what chat messages are and how a template writes them
(`rlhf.data.chat`), tokens and lengths (`rlhf.data.rows`).
"""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.chat import (
    Message,
    Refused,
    answer_message,
    conversation_messages,
    prompt_messages,
    render_answer,
    render_prompt,
    render_turns,
)
from rlhf.data.datasets import Row
from rlhf.recipe.schema import DatasetConfig


@dataclass(frozen=True)
class Texts:
    """What a loader makes of a row: a prompt and any number of pieces, each tokenised apart."""

    prompt: str
    pieces: tuple[str, ...] = ()
    note: Any = None  # what else the row says (a margin, a label)


class Columns:
    """What one dataset's columns hold. Every method raises Refused for a row that cannot be used.

    `key` is the dataset's section in the recipe; with `implicit_prompt` the rows have no prompt apart, the two
    answers of a pair begin with it.
    """

    def __init__(
        self, config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, key: str, implicit_prompt: bool
    ) -> None:
        self._config, self._tokenizer, self._key = config, tokenizer, key
        self._implicit_prompt = implicit_prompt
        self._known_characters: dict[str, bool] = {}

    def prompt(self, row: Row) -> str:
        """The row's prompt as text, chat template included."""
        if self._config.chat_template:
            return self._rendered_prompt(self._prompt_messages(row))
        prompt = self._prompt_cell(row)
        if not isinstance(prompt, str):
            raise Refused(f"column {self._config.prompt_column!r} {self._no_text(prompt)}")
        self.check(prompt, "the prompt")
        return prompt

    def answered(self, row: Row, columns: Sequence[str]) -> Texts:
        """The row's prompt and the answers to it in `columns`.

        The answers are texts, or one message of the assistant each, or (of two columns) whole conversations that
        part after the prompt.
        """
        values = [cell(row, column) for column in columns]
        for column, value in zip(columns, values, strict=True):
            if not isinstance(value, (str, Sequence) if self._config.chat_template else str):
                raise Refused(f"column {column!r} {self._no_text(value)}")
        texts = [isinstance(value, str) for value in values]
        if any(texts) and not all(texts):
            raise Refused(
                f"columns {' and '.join(map(repr, columns))} hold text and messages; make them alike"
            )
        if all(texts):
            for column, value in zip(columns, values, strict=True):
                self.check(value, f"column {column!r}")
            return (
                self._split_texts(values) if self._implicit_prompt else Texts(self.prompt(row), tuple(values))
            )
        if len(values) > 1 and (self._implicit_prompt or _holds_a_prompt(values[0])):
            prompt, answers = self._split_conversations(row, values)
        else:
            prompt = self._prompt_messages(row)
            answers = [answer_message(v, f"column {c!r}") for c, v in zip(columns, values, strict=True)]
        text = self._rendered_prompt(prompt)
        pieces = [render_answer(self._tokenizer, [*prompt, answer]) for answer in answers]
        for column, piece in zip(columns, pieces, strict=True):
            self.check(piece, f"column {column!r} in the chat template")
        return Texts(text, tuple(pieces))

    def conversation(self, row: Row, column: str) -> Texts:
        """The conversation in `column`: the prompt is what stands before the assistant's first text, the pieces are
        in turn the assistant's texts and what stands between them."""
        messages = conversation_messages(cell(row, column), self._config.system_prompt)
        first, *pieces = render_turns(self._tokenizer, messages)
        self.check(first + "".join(pieces), f"column {column!r} in the chat template")
        return Texts(first, tuple(pieces))

    def check(self, text: str, what: str) -> None:
        """Refuses a text that is blank or has characters without tokens."""
        if not text.strip():
            raise Refused(f"{what} is empty")
        if not all(self._knows(c) for c in set(text)):
            for token in self._tokenizer.get_added_vocab():  # <|eos|> is known, even if "|" is not
                text = text.replace(token, "")
        unknown = sorted(c for c in set(text) if not self._knows(c))
        if unknown:
            raise Refused(
                f"{what} has characters that the tokenizer does not know: {', '.join(map(repr, unknown))}"
            )

    def _no_text(self, value: Any) -> str:
        hint = f"; set {self._key}.chat_template: true for messages" if isinstance(value, Sequence) else ""
        return f"is a {type(value).__name__}, not text{hint}"

    def _prompt_cell(self, row: Row) -> Any:
        if self._config.prompt_template is not None:
            return _fill(self._config.prompt_template, row)
        return cell(row, self._config.prompt_column)

    def _prompt_messages(self, row: Row) -> list[Message]:
        return prompt_messages(self._prompt_cell(row), self._config.system_prompt)

    def _rendered_prompt(self, messages: Sequence[Message]) -> str:
        text = render_prompt(self._tokenizer, messages)
        self.check(text, "the prompt in the chat template")
        return text

    def _split_texts(self, values: Sequence[str]) -> Texts:
        """Two texts that begin with their prompt: it is what they share, up to white space."""
        if self._config.chat_template:
            raise Refused(
                "there is no prompt column, and the answers are texts, which no chat template can part from their "
                "prompt; give whole conversations as messages, or a prompt column"
            )
        shared = re.match(r".*\S(?=\s)", os.path.commonprefix(list(values)), re.DOTALL)
        if shared is None:
            raise Refused("there is no prompt column, and the two answers do not begin with the same words")
        return Texts(shared.group(), tuple(value[shared.end() :] for value in values))

    def _split_conversations(self, row: Row, values: Sequence[Any]) -> tuple[list[Message], list[Message]]:
        """What the conversations share, and the message with which each goes on."""
        system = self._config.system_prompt
        conversations = [conversation_messages(value, system) for value in values]
        shared = conversations[0][:-1]
        if any(c[:-1] != shared for c in conversations):
            raise Refused("the conversations part before their last message; only the last answer may differ")
        if not self._implicit_prompt:
            prompt = self._prompt_cell(row)
            contents = [message["content"] for message in shared]
            same = (
                prompt in contents if isinstance(prompt, str) else prompt_messages(prompt, system) == shared
            )
            if not same:
                raise Refused(f"the conversations do not begin with the prompt {str(prompt)!r:.80}")
        return shared, [c[-1] for c in conversations]

    def _knows(self, character: str) -> bool:
        """Whether the tokenizer gives a character tokens. Invisible format characters may vanish."""
        if character not in self._known_characters:
            tokenizer = self._tokenizer
            try:
                ids = tokenizer.encode(character, add_special_tokens=False)
                known = tokenizer.unk_token_id not in ids and (ids or unicodedata.category(character) == "Cf")
            except Exception:  # tokenizers raises a bare Exception where a vocabulary has no unknown token
                known = False
            self._known_characters[character] = bool(known)
        return self._known_characters[character]


def cell(row: Row, column: str) -> Any:
    """The value in a column. Raises Refused where it is missing or None."""
    if column not in row:
        raise Refused(f"column {column!r} is missing")
    if row[column] is None:
        raise Refused(f"column {column!r} is None")
    return row[column]


def _holds_a_prompt(messages: Any) -> bool:
    """Whether messages are a whole conversation, not an answer alone."""
    first = messages[0] if isinstance(messages, Sequence) and messages else None
    return isinstance(first, Mapping) and first.get("role") != "assistant"


def _fill(template: str, row: Row) -> str:
    """The template with the row's columns; nothing of a value is interpreted."""
    return "".join(
        literal + ("" if field is None else str(cell(row, field)))
        for literal, field, _, _ in string.Formatter().parse(template)
    )
