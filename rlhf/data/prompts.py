"""From dataset rows to prompts, and to examples to imitate: texts, tokens, and every check that data can
fail.

All rows are read, checked and tokenised before step 1. Not here: where rows come from (`rlhf.data.datasets`)
and the order in which they are visited (`rlhf.data.cursor`).
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import logging
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf.batching import SftExample
from rlhf.data.datasets import BadRow, Row, did_you_mean, load_rows
from rlhf.recipe.schema import DatasetConfig
from rlhf.records import Prompt

_log = logging.getLogger("rlhf.data")
_SHOWN = 5  # reasons of skipped rows that are logged

_ROLES = ("system", "user", "assistant", "tool")

Item = TypeVar("Item", Prompt, SftExample)


class _Refused(Exception):
    """This row cannot be used; the text says why. Raised and caught in this module only."""


@dataclass(frozen=True)
class _Dataset(Generic[Item]):
    """Items in the source's order. `counts`: rows kept, filtered_long, truncated, bad_rows."""

    items: tuple[Item, ...]
    fingerprint: str  # 32 hex digits: equal if ids, tokens and columns are equal
    counts: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


class PromptDataset(_Dataset[Prompt]):
    """Prompts to sample from."""


class SftDataset(_Dataset[SftExample]):
    """Examples to imitate."""


def load_prompts(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context: int | None,
    rows: Sequence[Row] | None = None,
) -> PromptDataset:
    """The prompts of a dataset; a prompt's id is "<name>/<number of its row in the source>".

    `max_context` is the longest prompt in tokens that leaves room for a response; longer ones, and those
    beyond config.max_prompt_tokens, go by config.too_long. `rows` takes the place of the source that `config`
    names. Raises ValueError for a source or a column that is missing, for a row that cannot be used
    (config.bad_rows=error), and when nothing is left.
    """
    build = _Builder(config, tokenizer, name, rows)
    limit = config.max_prompt_tokens if max_context is None else min(config.max_prompt_tokens, max_context)
    items = []
    for row in build.rendered():
        ids, text = build.fit(row, limit)
        if ids is not None:
            items.append(Prompt(id=row.id, token_ids=ids, text=text, row=row.columns))
    return PromptDataset(*build.finish(items, _describe_prompt))


def load_sft(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context: int | None = None,
    rows: Sequence[Row] | None = None,
) -> SftDataset:
    """The examples of a dataset: the prompt as `load_prompts` makes it, then the text of
    config.response_column and the end-of-sequence token. Prompt and response are tokenised apart, as the
    policy will meet them.

    `max_context` is the longest prompt + response in tokens; config.too_long applies ("truncate" cuts the
    prompt, and drops the row where the response alone is too long). Raises ValueError as `load_prompts` does,
    and for a tokenizer without an end-of-sequence token, with which no policy could learn to stop.
    """
    if config.response_column is None:
        raise ValueError("data.response_column is not set; sft needs the column with the answer to imitate")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so no answer could ever end; choose another one"
        )
    build = _Builder(config, tokenizer, name, rows)
    items = []
    for row in build.rendered():
        response_ids = _with_eos(row.response_ids, tokenizer.eos_token_id)
        limit = config.max_prompt_tokens
        if max_context is not None:
            limit = min(limit, max_context - len(response_ids))
        ids, _ = build.fit(row, limit)
        if ids is not None:
            items.append(SftExample(id=row.id, prompt_ids=ids, response_ids=response_ids))
    return SftDataset(*build.finish(items, _describe_example))


@dataclass(frozen=True)
class _Rendered:
    """A good row: its text, and the tokens of it."""

    id: str
    columns: Row
    text: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # () without a response column


class _Builder:
    """The shared way of load_prompts and load_sft, with its counts."""

    def __init__(
        self, config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, name: str, rows: Sequence[Row] | None
    ) -> None:
        self._config, self._tokenizer, self._name = config, tokenizer, name
        self._rows = load_rows(config) if rows is None else list(rows)[: config.limit]
        if not self._rows:
            raise ValueError(f"dataset {name!r} is empty")
        self._counts = {"kept": 0, "filtered_long": 0, "truncated": 0, "bad_rows": 0}
        self._fields = _template_fields(config.prompt_template)
        if config.chat_template and not tokenizer.chat_template:
            raise ValueError(
                f"dataset {name!r}: chat_template is true, but the tokenizer has none; "
                "choose a chat model's tokenizer or write the prompt with data.prompt_template"
            )
        self._check_columns()
        self._bos = _bos_ids(tokenizer)
        self._known_characters: dict[str, bool] = {}

    def rendered(self) -> Iterable[_Rendered]:
        """The good rows with their tokens. Bad rows are counted or raise, by config.bad_rows."""
        good: list[tuple[int, Row, str, str]] = []
        for index, row in enumerate(self._rows):
            try:
                good.append((index, row, self._prompt_text(row), self._response_text(row)))
            except _Refused as refused:
                self._bad(index, str(refused))
        prompts = self._encode([prompt for _, _, prompt, _ in good])
        responses = self._encode([response for _, _, _, response in good])
        for (index, row, text, _), prompt_ids, response_ids in zip(good, prompts, responses, strict=True):
            if not self._config.chat_template and prompt_ids[:1] != self._bos:
                prompt_ids = self._bos + prompt_ids  # a chat template writes its own
            if prompt_ids[:2] == (self._tokenizer.bos_token_id,) * 2:
                bos = self._tokenizer.bos_token
                self._bad(index, f"the prompt begins with two {bos} tokens: {text[:80]!r}")
                continue
            yield _Rendered(f"{self._name}/{index}", row, text, prompt_ids, response_ids)

    def fit(self, row: _Rendered, limit: int) -> tuple[tuple[int, ...] | None, str]:
        """The prompt's tokens and text within `limit` tokens; None where the row is dropped."""
        length, policy = len(row.prompt_ids), self._config.too_long
        if length <= limit:
            return row.prompt_ids, row.text
        if policy == "error":
            raise ValueError(
                f"row {row.id}: the prompt has {length} tokens, there is room for {max(limit, 0)}; "
                "raise data.max_prompt_tokens (within the model's context), "
                "or set data.too_long to filter or truncate"
            )
        head = self._bos if row.prompt_ids[:1] == self._bos else ()
        if policy == "filter" or limit <= len(head):
            self._counts["filtered_long"] += 1
            return None, ""
        self._counts["truncated"] += 1
        kept = row.prompt_ids[length - (limit - len(head)) :]
        return head + kept, self._tokenizer.decode(kept, skip_special_tokens=False)

    def finish(
        self, items: Sequence[Item], describe: Callable[[Item], Any]
    ) -> tuple[tuple[Item, ...], str, dict[str, int]]:
        """(items, fingerprint, counts). Raises ValueError if nothing is left."""
        counts = self._counts | {"kept": len(items)}
        if not items:
            raise ValueError(
                f"dataset {self._name!r}: none of {len(self._rows)} rows is left: {counts['bad_rows']} bad, "
                f"{counts['filtered_long']} longer than the room for a prompt (data.max_prompt_tokens="
                f"{self._config.max_prompt_tokens}, and the model's context)"
            )
        digest = hashlib.blake2b(digest_size=16)
        for item in items:
            digest.update(json.dumps(describe(item), sort_keys=True, default=_stable).encode() + b"\n")
        return tuple(items), digest.hexdigest(), counts

    # -- texts -------------------------------------------------------------------------------------

    def _check_columns(self) -> None:
        """Every column that the recipe names must be in some row at least."""
        columns = sorted({c for row in self._rows if isinstance(row, Mapping) for c in row})
        config = self._config
        wanted = {f: "prompt_template" for f in self._fields or ()}
        if config.prompt_template is None:
            wanted[config.prompt_column] = "prompt_column"
        if config.response_column is not None:
            wanted[config.response_column] = "response_column"
        for column, key in wanted.items():
            if columns and column not in columns:
                raise ValueError(
                    f"dataset {self._name!r} has no column {column!r} (data.{key})"
                    f"{did_you_mean(column, columns)}; it has {', '.join(columns)}"
                )

    def _prompt_text(self, row: Row | BadRow) -> str:
        if isinstance(row, BadRow):
            raise _Refused(row.reason)
        if not isinstance(row, Mapping):
            raise _Refused(f"it is a {type(row).__name__}, not a mapping of columns")
        config = self._config
        if config.prompt_template is not None:
            prompt: Any = _fill(config.prompt_template, row)
        else:
            prompt = _cell(row, config.prompt_column)
        if config.chat_template:
            return self._chat_text(prompt)
        if not isinstance(prompt, str):
            hint = "; set data.chat_template: true for messages" if isinstance(prompt, Sequence) else ""
            raise _Refused(f"column {config.prompt_column!r} is a {type(prompt).__name__}, not text{hint}")
        self._check_text(prompt, "the prompt")
        return prompt

    def _chat_text(self, prompt: Any) -> str:
        messages = _messages(prompt, self._config.system_prompt)
        if not messages[-1]["content"].strip():
            raise _Refused("the prompt is empty")
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise _Refused(f"the chat template refuses it: {error}") from None
        self._check_text(text, "the prompt in the chat template")
        return text

    def _response_text(self, row: Row) -> str:
        column = self._config.response_column
        if column is None:
            return ""
        response = _cell(row, column)
        if not isinstance(response, str):
            raise _Refused(f"column {column!r} is a {type(response).__name__}, not text")
        self._check_text(response, "the response")
        return response

    def _check_text(self, text: str, what: str) -> None:
        if not text.strip():
            raise _Refused(f"{what} is empty")
        if not all(self._knows(c) for c in set(text)):
            for token in self._tokenizer.get_added_vocab():  # <|eos|> is known, even if "|" is not
                text = text.replace(token, "")
        unknown = sorted(c for c in set(text) if not self._knows(c))
        if unknown:
            raise _Refused(
                f"{what} has characters that the tokenizer does not know: {', '.join(map(repr, unknown))}"
            )

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

    def _encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [tuple(ids) for ids in encoded]

    def _bad(self, index: int, reason: str) -> None:
        if self._config.bad_rows == "error":
            raise ValueError(
                f"row {self._name}/{index}: {reason}; "
                "mend it, or set data.bad_rows: skip to leave such rows out"
            )
        self._counts["bad_rows"] += 1
        if self._counts["bad_rows"] <= _SHOWN:
            _log.warning("row %s/%d is left out: %s", self._name, index, reason)


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        raise _Refused(f"column {column!r} is missing")
    if row[column] is None:
        raise _Refused(f"column {column!r} is None")
    return row[column]


def _template_fields(template: str | None) -> tuple[str, ...] | None:
    """Columns named in a template. Raises ValueError for anything but plain {column}."""
    if template is None:
        return None
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"data.prompt_template={template!r}: {error}; write a plain brace twice") from None
    fields = []
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if not field or spec or conversion or "." in field or "[" in field:
            raise ValueError(
                f"data.prompt_template={template!r}: only plain {{column}} fields, found {{{field}}}"
            )
        fields.append(field)
    return tuple(fields)


def _fill(template: str, row: Row) -> str:
    """The template with the row's columns; nothing of a value is interpreted."""
    return "".join(
        literal + ("" if field is None else str(_cell(row, field)))
        for literal, field, _, _ in string.Formatter().parse(template)
    )


def _messages(prompt: Any, system_prompt: str | None) -> list[dict[str, str]]:
    """The prompt as chat messages, the last of which asks for an answer."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not messages:
        raise _Refused(f"the prompt is {prompt!r:.80}, neither text nor a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise _Refused(f"the message {message!r:.80} is not {{role, content}} with text in it")
        if message.get("role") not in _ROLES:
            raise _Refused(
                f"the message's role is {message.get('role')!r}; it must be one of {', '.join(_ROLES)}"
            )
    if messages[-1]["role"] not in ("user", "tool"):
        raise _Refused(f"the last message is the {messages[-1]['role']}'s; there is nothing to answer")
    if any(m["role"] == "system" for m in messages[1:]):
        raise _Refused("a system message comes after the first message")
    if system_prompt is not None:
        if messages[0]["role"] == "system":
            raise _Refused("it has a system message of its own beside data.system_prompt")
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return [dict(m) for m in messages]


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself: (bos,) or ()."""
    first = tokenizer.encode("1")[:1]
    return (first[0],) if first and first[0] == tokenizer.bos_token_id else ()


def _with_eos(ids: tuple[int, ...], eos: int) -> tuple[int, ...]:
    return ids if ids[-1:] == (eos,) else (*ids, eos)


def _stable(value: Any) -> Any:
    """A value that JSON does not know, as the same text in every process."""
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return str(value)
    return type(value).__name__


def _describe_prompt(prompt: Prompt) -> list[Any]:
    return [prompt.id, prompt.token_ids, dict(prompt.row)]


def _describe_example(example: SftExample) -> list[Any]:
    return [example.id, example.prompt_ids, example.response_ids]
