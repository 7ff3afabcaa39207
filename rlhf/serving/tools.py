"""Calls of tools in the text of a model: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes and Qwen
write them.

Here: finding them piece by piece, and the grammar of an answer that must be one. Not here: telling the model of its tools,
which the chat template does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.rollout import Grammar
from rlhf.serving.bodies import Function
from rlhf.serving.text import StopCutter

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class CallNews:
    """Of one call: its beginning, or more of its arguments."""

    number: int  # of the answer's calls
    name: str | None  # with the first news
    arguments: str  # JSON, or what the model takes for it; all news together are the whole


@dataclass
class Found:
    """What a piece of text brought: text, and at most one piece of news of each call."""

    content: str = ""
    calls: list[CallNews] = field(default_factory=list)


class ToolParser:
    """Tells text and calls apart. A call is told from the moment on when it is clear that it is one of a tool that is there,
    its arguments as they are written. What looks like a call and is none stays text, and no character is lost but the
    white space around calls."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._outside = StopCutter([_OPEN], include=False)
        self._inside: str | None = None  # the text since <tool_call>, of what may become a call
        self._arguments: _Object | None = None  # of the call that is being told
        self._end = ""  # what came after these, before </tool_call>
        self._space = ""  # held back: it belongs to a call that may follow
        self._num_calls = 0
        self._after_call = False

    def push(self, text: str, *, is_over: bool) -> Found:
        """Raises nothing: the model's text is what it is."""
        found = Found()
        while text:
            if self._arguments is not None:
                text = self._go_on(self._arguments, text, found)
            elif self._inside is not None:
                text = self._begin(self._inside + text, found)
            else:
                text = self._content(text, found)
        if is_over:
            if self._inside is not None:
                self._say(_OPEN + self._inside, found)
                self._inside = None
            after = self._end.lstrip().removeprefix("}").lstrip()
            if after and not _CLOSE.startswith(after):  # the mark of its end never came
                self._say(after, found)
            self._say(self._outside.end("", is_stopped=False), found)
            if not self._num_calls:
                found.content += self._space
            self._space = ""
        return found

    def _content(self, text: str, found: Found) -> str:
        """Take text up to the next call; what comes after it is returned."""
        certain = self._outside.push(text)
        before, opened, after = certain.partition(_OPEN)
        self._say(before, found)
        if not opened:
            return ""
        self._inside = ""
        return after + self._outside.end("", is_stopped=False)

    def _say(self, text: str, found: Found) -> None:
        text = self._space + text
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        bare = text.rstrip()
        self._space = text[len(bare) :]
        found.content += bare

    def _begin(self, inside: str, found: Found) -> str:
        """Look at the text since <tool_call>; what comes after the part of it that is clear is returned."""
        head = _HEAD.match(inside)
        name = _text(head.group(1)) if head is not None else None
        if head is not None and name in self._names:
            self._tell(name, "", found)
            self._arguments, self._inside = _Object(), None
            return inside[head.end() :]
        body, close, after = inside.partition(_CLOSE)
        if not close:
            self._inside = inside
            return ""
        self._inside = None
        call = _call(body, self._names)
        if call is None:
            self._say(_OPEN + body + _CLOSE, found)
        else:
            self._tell(*call, found)
            self._after_call = True
        return after

    def _go_on(self, arguments: _Object, text: str, found: Found) -> str:
        """Tell more of a call; what comes after it is returned."""
        if not arguments.is_closed:
            size = arguments.take(text)
            self._tell(None, text[:size], found)
            text = text[size:]
        self._end, close, after = (self._end + text).partition(_CLOSE)
        if close:
            self._arguments, self._end, self._after_call = None, "", True
        return after

    def _tell(self, name: str | None, arguments: str, found: Found) -> None:
        if name is not None:
            self._num_calls += 1
            self._space = ""
        number = self._num_calls - 1
        if found.calls and found.calls[-1].number == number:
            first = found.calls.pop()
            name, arguments = first.name, first.arguments + arguments
        if name is not None or arguments:
            found.calls.append(CallNews(number, name, arguments))


class _Object:
    """Where a JSON object that comes in pieces ends. One that is none ends where a mark begins that it cannot hold."""

    def __init__(self) -> None:
        self.is_closed = False
        self._depth = 0
        self._in_text = self._is_escaped = False

    def take(self, text: str) -> int:
        """How many of the next characters belong to it."""
        for at, c in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_text:
                self._is_escaped, self._in_text = c == "\\", c != '"'
            elif c == '"':
                self._in_text = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if not self._depth:
                    self.is_closed = True
                    return at + 1
            elif c == "<":
                self.is_closed = True
                return at
        return len(text)


def _call(body: str, names: frozenset[str]) -> tuple[str, str] | None:
    """Name and arguments of a call that is whole, however its object is ordered."""
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # some models quote them
        return value["name"], arguments
    return value["name"], json.dumps(arguments, ensure_ascii=False)


def _text(quoted: str) -> str | None:
    try:
        return json.loads(quoted)
    except ValueError:
        return None


def call_grammar(functions: Sequence[Function], *, several: bool) -> Grammar:
    """One call of one of the functions, or `several`, and nothing else."""
    rules, names = [], []
    for i, function in enumerate(functions):
        opening = json.dumps(f'{_OPEN}\n{{"name": "{function.name}", "arguments": ')
        schema = function.parameters if function.parameters is not None else {"type": "object"}
        rules += [
            f"call{i}: {opening} arguments{i} {json.dumps('}' + chr(10) + _CLOSE)}",
            f"arguments{i}: %json {json.dumps(schema)}",
        ]
        names.append(f"call{i}")
    more = ' ("\\n" call)*' if several else ""
    return Grammar("lark", "\n".join([f"start: call{more}", f"call: {' | '.join(names)}", *rules]))


def choice_grammar(choices: Sequence[str]) -> Grammar:
    """One of the texts."""
    return Grammar("lark", "start: " + " | ".join(json.dumps(text) for text in choices))
