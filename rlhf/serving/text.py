"""Tokens into text as they come, and stop texts out of it.

Here: text that is only given away once nothing can change it, one token's own text and bytes. Not here: when a sample
ends, which the engine decides (`rlhf.rollout.special`), and chat templates (`rlhf.serving.chat`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no text decode to; the last one may still become a character
_MOST_HELD = 32  # tokens that end in no character
_CHARACTER_BYTES = 4
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Detokenizer:
    """One sample's text, piece by piece. Together the pieces are what decoding all tokens at once gives.

    A character that several tokens write is given away with the last of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._given: list[int] = []  # the tokens before, for the space between two words
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now."""
        text = ""
        for token in token_ids:
            self._held.append(token)
            more = self._text(self._held)
            if not more.endswith(_UNKNOWN):
                text += self._give(len(self._held), more)
            elif len(self._held) >= _MOST_HELD:
                text += self._give_certain(more)
        return text

    def end(self) -> str:
        """What was held back."""
        return self._give(len(self._held), self._text(self._held)) if self._held else ""

    def _text(self, ids: list[int]) -> str:
        """Of tokens that follow those given."""
        before = self._decode(self._given)
        return self._decode(self._given + ids)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        assert isinstance(text, str), "a list of ids decodes to one text"
        return text

    def _give(self, count: int, text: str) -> str:
        self._given, self._held = self._held[:count], self._held[count:]
        return text

    def _give_certain(self, text: str) -> str:
        """Of many tokens that are no text: all but those which the last character may need."""
        for kept in range(_CHARACTER_BYTES - 1, _MOST_HELD - 1):
            first, last = self._held[:-kept], self._held[-kept:]
            if self._text(first) + self._decode(last) == text:
                return self._give(len(first), self._text(first))
        return ""


class StopCutter:
    """A text that ends before the first of some stop texts, piece by piece: what may become one is held back."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops, self._include = tuple(stops), include
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain now."""
        if not self._stops:
            return text
        self._held += text
        kept = max(_beginning_of(stop, self._held) for stop in self._stops)
        certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return certain

    def end(self, text: str, *, is_stopped: bool) -> str:
        """The last piece, of which `text` was not pushed; cut if a stop text has ended the sample."""
        text, self._held = self._held + text, ""
        if not is_stopped:
            return text
        found = [(at, len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not found:
            return text
        at, length = min(
            found, key=lambda f: (f[0] + f[1], f[0])
        )  # the one that was complete first, the longest of these
        return text[: at + length] if self._include else text[:at]


class SampleText:
    """What a person sees of one sample: text without special tokens, the token that ended it and stop texts.

    `stop_ids` and `stops` are those the engine was given, `include_stop` keeps them in the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int],
        stops: Sequence[str],
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._cutter = StopCutter(stops, include=include_stop)
        self._stop_ids = frozenset(() if include_stop else stop_ids)

    def push(self, token_ids: Sequence[int], finish_reason: str | None) -> str:
        """The text that these tokens bring; with the reason of the end everything that was held back."""
        if finish_reason is None:
            return self._cutter.push(self._detokenizer.push(token_ids))
        ids = list(token_ids)
        is_stop = finish_reason == "stop"
        ended_by_id = is_stop and bool(ids) and ids[-1] in self._stop_ids
        if ended_by_id:
            ids.pop()
        certain = self._cutter.push(self._detokenizer.push(ids[:-1]))
        text = self._detokenizer.push(ids[-1:]) + self._detokenizer.end()
        return certain + self._cutter.end(text, is_stopped=is_stop and not ended_by_id)


def _beginning_of(stop: str, text: str) -> int:
    """How many of the text's last characters are a beginning of the stop text, which is not whole."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


class TokenTexts:
    """The text and the bytes of single tokens, for log-probs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}
        self._is_byte_level = '"ByteLevel"' in _decoder_json(tokenizer)

    def bytes(self, token: int) -> bytes:
        """A token of the middle of a character has bytes that are no text."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the embedding without a token
            return b""
        match = _BYTE_TOKEN.fullmatch(piece)
        if match:
            return bytes([int(match.group(1), 16)])
        of = _byte_of_character()
        if self._is_byte_level and all(c in of for c in piece):
            return bytes(of[c] for c in piece)
        return self._tokenizer.decode([token]).encode()

    def text(self, token: int) -> str:
        return self.bytes(token).decode(errors="replace")

    def name(self, token: int) -> str:
        """As `text`; other than that, no two tokens of different bytes share it."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _decoder_json(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        return ""
    decoder = tokenizer.backend_tokenizer.decoder
    return "" if decoder is None else decoder.__getstate__().decode()


@cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes bytes as characters: those that can be seen as themselves, the others from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [b for b in range(256) if b not in seen]
    return {**{chr(b): b for b in seen}, **{chr(256 + i): b for i, b in enumerate(unseen)}}
