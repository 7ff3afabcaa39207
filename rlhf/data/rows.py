"""What every loader does with its rows: texts to tokens, lengths, bad rows, counts, the fingerprint.

Here: the reader that the loaders of `rlhf.data` share, and what they return. Not here: where rows come from
(`rlhf.data.datasets`), the texts in their columns (`rlhf.data.texts`), and what makes a prompt, a pair or a judged
answer of them (the loaders).
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf.data.chat import Refused
from rlhf.data.datasets import BadRow, Kind, Row, column_faults, has_implicit_prompt, load_rows
from rlhf.data.texts import Columns, Texts
from rlhf.recipe.schema import DatasetConfig

_log = logging.getLogger("rlhf.data")
_SHOWN = 5  # reasons of skipped rows that are logged

Item = TypeVar("Item")


@dataclass(frozen=True)
class Dataset(Generic[Item]):
    """Items in the source's order. `counts`: rows kept, filtered_long, truncated, bad_rows."""

    items: tuple[Item, ...]
    fingerprint: str  # 32 hex digits: equal if ids, tokens and columns are equal
    counts: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


@dataclass(frozen=True)
class Tokens:
    """A good row as tokens."""

    id: str
    index: int
    columns: Row
    text: str  # the prompt
    prompt_ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    note: Any


_SECTIONS = {"train": "data", "ptx": "ptx.data"}
_EVALUATED = {"prompts": "sets", "preferences": "pairs"}
MIX = "mix."  # before the name of a further training set


def section(name: str, kind: Kind) -> str:
    """Where the recipe describes the dataset of this name."""
    if name in _SECTIONS:
        return _SECTIONS[name]
    if name.startswith(MIX):
        return name
    return f"evaluation.{_EVALUATED.get(kind, 'held_out')}.{name}"


class Reader:
    """One dataset's rows on their way to items, with their counts.

    `kind` says what they are to become, and so which columns they need. Raises ValueError for a source or a column
    that is missing, and for a tokenizer that cannot do what the recipe wants.
    """

    def __init__(
        self,
        config: DatasetConfig,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        rows: Sequence[Row] | None,
        kind: Kind,
    ) -> None:
        self.key = section(name, kind)
        self._config, self._tokenizer, self._name = config, tokenizer, name
        self._rows = load_rows(config, self.key) if rows is None else list(rows)[: config.limit]
        if not self._rows:
            raise ValueError(f"dataset {name!r} is empty; hand over rows")
        self._counts = {"kept": 0, "filtered_long": 0, "truncated": 0, "bad_rows": 0}
        if config.chat_template and not tokenizer.chat_template:
            raise ValueError(
                f"{self.key}.chat_template is true, but the tokenizer has no chat template; choose a chat model's "
                f"tokenizer, or set it to false and write the prompt with {self.key}.prompt_template"
            )
        if kind in ("sft", "preferences", "labels") and tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so no answer could ever end; choose another one"
            )
        present = {c for row in self._rows if isinstance(row, Mapping) for c in row}
        for fault in column_faults(config, kind, present):
            raise ValueError(str(fault.below((self.key,))))
        self.columns = Columns(
            config, tokenizer, key=self.key, implicit_prompt=has_implicit_prompt(config, kind, present)
        )
        self._bos = _bos_ids(tokenizer)
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._last_ids: Counter[int] = Counter()  # of the answers
        self._shortest_dropped: tuple[int, int] | None = None  # tokens of a prompt, and its room

    def tokens(self, read: Callable[[Row], Texts]) -> Iterator[Tokens]:
        """The good rows. Those for which `read` raises Refused are counted or raise, by config.bad_rows."""
        good: list[tuple[int, Row, Texts]] = []
        for index, row in enumerate(self._rows):
            try:
                good.append((index, row, _read(row, read)))
            except Refused as refused:
                self.leave_out(index, str(refused))
            except ValueError as error:
                raise ValueError(f"row {self._name}/{index}: {error}") from None
        ids = iter(self._encode([text for _, _, texts in good for text in (texts.prompt, *texts.pieces)]))
        for index, row, texts in good:
            prompt_ids = next(ids)
            pieces = tuple(next(ids) for _ in texts.pieces)
            if not self._config.chat_template and prompt_ids[:1] != self._bos:
                prompt_ids = self._bos + prompt_ids  # a chat template writes its own
            if prompt_ids[:2] == (self._tokenizer.bos_token_id,) * 2:
                bos = self._tokenizer.bos_token
                self.leave_out(index, f"the prompt begins with two {bos} tokens: {texts.prompt[:80]!r}")
                continue
            yield Tokens(f"{self._name}/{index}", index, row, texts.prompt, prompt_ids, pieces, texts.note)

    def leave_out(self, index: int, reason: str) -> None:
        """A bad row: raises ValueError, or is counted and named, by config.bad_rows."""
        if self._config.bad_rows == "error":
            raise ValueError(
                f"row {self._name}/{index}: {reason}; "
                f"mend it, or set {self.key}.bad_rows: skip to leave such rows out"
            )
        self._counts["bad_rows"] += 1
        if self._counts["bad_rows"] <= _SHOWN:
            _log.warning("row %s/%d is left out: %s", self._name, index, reason)

    def closed(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """An answer's tokens with the end-of-sequence token, unless they end in a special token already."""
        if not ids or ids[-1] not in self._special_ids:
            ids = (*ids, self._tokenizer.eos_token_id)
        self._last_ids[ids[-1]] += 1
        return ids

    def fit(
        self, row: Tokens, *, max_context: int | None, beside: int = 0
    ) -> tuple[tuple[int, ...] | None, str]:
        """The prompt's tokens and text, short enough for config.max_prompt_tokens and for a context of `max_context`
        tokens in which an answer takes `beside`; None where the row is dropped."""
        length, policy = len(row.prompt_ids), self._config.too_long
        limit = self._config.max_prompt_tokens
        if max_context is not None:
            limit = min(limit, max_context - beside)
        if length <= limit:
            return row.prompt_ids, row.text
        if policy == "error":
            answer = f" beside an answer of {beside}" if beside else ""
            raise ValueError(
                f"row {row.id}: the prompt has {length} tokens, there is room for {max(limit, 0)}{answer}; "
                f"raise {self.key}.max_prompt_tokens (within the model's context), "
                f"or set {self.key}.too_long to filter or truncate"
            )
        head = self._bos if row.prompt_ids[:1] == self._bos else ()
        if policy == "filter" or limit <= len(head):
            self._counts["filtered_long"] += 1
            self._shortest_dropped = min(self._shortest_dropped or (length, limit), (length, limit))
            return None, ""
        self._counts["truncated"] += 1
        kept = row.prompt_ids[length - (limit - len(head)) :]
        return head + kept, self._tokenizer.decode(kept, skip_special_tokens=False)

    def finish(
        self, items: Sequence[Item], describe: Callable[[Item], Any] = vars
    ) -> tuple[tuple[Item, ...], str, dict[str, int]]:
        """(items, fingerprint of what `describe` says of them, counts). Raises ValueError if nothing is left."""
        counts = self._counts | {"kept": len(items)}
        if not items:
            raise ValueError(
                f"{self.key}: none of {len(self._rows)} rows is left: {counts['bad_rows']} bad, "
                f"{counts['filtered_long']} longer than the room for a prompt{self._way_out()}"
            )
        self._warn_of_an_untrained_stop()
        digest = hashlib.blake2b(digest_size=16)
        for item in items:
            digest.update(json.dumps(describe(item), sort_keys=True, default=_stable).encode() + b"\n")
        return tuple(items), digest.hexdigest(), counts

    def _way_out(self) -> str:
        """What to change, where every prompt was too long."""
        if self._shortest_dropped is None:
            return f"; mend the rows, or name other columns in {self.key}"
        length, room = self._shortest_dropped
        if room == self._config.max_prompt_tokens:
            way = f"raise {self.key}.max_prompt_tokens={room}"
        else:
            way = "lower max_response_tokens, shorten the answers, or take a model with a longer context"
        return (
            f"; the shortest prompt has {length} tokens and the room is {max(room, 0)}: {way}, or set "
            f"{self.key}.too_long: truncate"
        )

    def _warn_of_an_untrained_stop(self) -> None:
        tokenizer = self._tokenizer
        if self._last_ids and tokenizer.eos_token_id not in self._last_ids:
            last = tokenizer.decode([self._last_ids.most_common(1)[0][0]])
            _log.warning(
                "dataset %r: every answer ends in a special token such as %r and none in the tokenizer's end-of-sequence "
                "token %r: a policy trained on it stops only where sampling stops at %r too (rollout.stop)",
                *(self._name, last, tokenizer.eos_token, last),
            )

    def _encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [tuple(ids) for ids in encoded]


def _read(row: Row | BadRow, read: Callable[[Row], Texts]) -> Texts:
    if isinstance(row, BadRow):
        raise Refused(row.reason)
    if not isinstance(row, Mapping):
        raise Refused(f"it is a {type(row).__name__}, not a mapping of columns")
    return read(row)


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself: (bos,) or ()."""
    first = tokenizer.encode("")[:1]  # any text might be one that a small alphabet cannot spell
    return (first[0],) if first and first[0] == tokenizer.bos_token_id else ()


def _stable(value: Any) -> Any:
    """A value that JSON does not know, as the same text in every process."""
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return str(value)
    return type(value).__name__
