"""Calls of tools in the text of a model: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes and Qwen
write them.

Here: finding them piece by piece, and the grammar of an answer that must be one. Not here: telling the model of its tools,
which the chat template does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.rollout import Grammar
from rlhf.serving.bodies import Function
from rlhf.serving.text import StopCutter

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """Of a tool."""

    name: str
    arguments: str  # JSON


@dataclass
class Found:
    """What a piece of text brought: text, and calls that are complete."""

    content: str = ""
    calls: list[Call] = field(default_factory=list)


class ToolParser:
    """Tells text and calls apart. What looks like a call and is none stays text, and no character is lost but the white
    space around calls."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._outside = StopCutter([_OPEN], include=False)
        self._inside: str | None = None  # the text since <tool_call>
        self._space = ""  # held back: it belongs to a call that may follow
        self._num_calls = 0
        self._after_call = False

    def push(self, text: str, *, is_over: bool) -> Found:
        """Raises nothing: the model's text is what it is."""
        found = Found()
        while True:
            if self._inside is None:
                text = self._content(text, found)
                if self._inside is None:
                    break
            self._inside += text
            body, close, text = self._inside.partition(_CLOSE)
            if not close:
                break
            self._inside = None
            self._end_call(body, found)
        if is_over:
            if self._inside is not None:
                self._say(_OPEN + self._inside, found)
                self._inside = None
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

    def _end_call(self, body: str, found: Found) -> None:
        call = _call(body, self._names)
        if call is None:
            self._say(_OPEN + body + _CLOSE, found)
            return
        self._num_calls += 1
        self._space, self._after_call = "", True
        found.calls.append(call)


def _call(body: str, names: frozenset[str]) -> Call | None:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # some models quote them
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


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
