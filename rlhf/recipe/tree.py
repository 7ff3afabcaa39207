"""A recipe as a tree of values that know where they were written.

Here: reading a file, a dictionary and one `key=value` into nodes, and deep merge. Values follow OmegaConf's rules (5e-5
is a number, a date is text, a key given twice is a mistake). Tags, aliases and several documents are refused: a recipe
is data. Not here: interpolation (`interpolate`) and the schema (`check`).
"""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlhf.recipe.problems import Problem, RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
PathKey = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a key was written."""

    file: str
    line: int | None
    key: str  # dotted path in that file, for example "stages.grpo.trainer.lr"

    def problem(self, message: str, hint: str = "") -> Problem:
        return Problem(self.file, self.line, self.key, message, hint)

    def below(self, key: str | int) -> str:
        return f"{self.key}.{key}" if self.key else str(key)


@dataclass(frozen=True)
class Node:
    """A value: a dict of nodes, a list of nodes, or a scalar."""

    value: Any
    place: Place
    text: str | None = None  # an unquoted scalar exactly as written, because `off` may have meant the word
    expression: str | None = None  # the interpolation it came from, kept where that reads the environment

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def children(self) -> Iterator[tuple[str | int, Node]]:
        if isinstance(self.value, dict):
            yield from self.value.items()
        elif isinstance(self.value, list):
            yield from enumerate(self.value)

    def walk(self, path: PathKey = ()) -> Iterator[tuple[PathKey, Node]]:
        """This node and everything below it, with paths."""
        yield path, self
        for key, child in self.children():
            yield from child.walk((*path, key))

    def find(self, path: PathKey) -> Node | None:
        """The node at a path, or None."""
        node = self
        for key in path:
            found = dict(node.children()).get(key)
            if found is None:
                return None
            node = found
        return node

    def nearest(self, path: PathKey) -> Node:
        """The deepest node on the way to a path."""
        node = self
        for key in path:
            found = dict(node.children()).get(key)
            if found is None:
                return node
            node = found
        return node

    def way(self, path: PathKey) -> PathKey:
        """The part of a path that exists."""
        return next(path[:n] for n in range(len(path), -1, -1) if self.find(path[:n]) is not None)

    def put(self, path: PathKey, child: Node | None) -> Node:
        """A copy with the node at `path` replaced, or removed (None). The way to it must exist."""
        if not path:
            assert child is not None
            return child
        items = dict(self.children())
        if len(path) == 1 and child is None:
            items.pop(path[0], None)
        else:
            items[path[0]] = items[path[0]].put(path[1:], child) if len(path) > 1 else child
        return replace(self, value=list(items.values()) if isinstance(self.value, list) else items)


def merge(base: Node, over: Node) -> Node:
    """Deep merge: dictionaries key by key, anything else is replaced by `over`."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return replace(over, value=merged)


# ---------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with OmegaConf's idea of a number and of a date."""


_FLOAT = "tag:yaml.org,2002:float"
_OMITTED = (_FLOAT, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _OMITTED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)

_YAML_MESSAGES = {
    "cannot start any token": "a tab or another stray character; indent with spaces",
    "mapping values are not allowed here": "a second ':' on the line, or a wrong indent; put text with ':' in quotes",
    "could not find expected ':'": "a key without ':'; write `key: value`",
    "expected <block end>": "the indent does not match the lines above",
    "expected a single document": "several documents in one file; a recipe is one, so remove the `---`",
    "expected ',' or": "a bracket is not closed",
}


def read_file(path: str | os.PathLike, problems: list[Problem]) -> Node:
    """Read a recipe file. Adds what can be survived (a key given twice) to `problems`; raises RecipeError otherwise."""
    file = os.fspath(path)
    top = Place(file, None, "")
    try:
        if not Path(path).exists():
            raise RecipeError(
                [top.problem("no such file", f"looked in {os.getcwd()}; give the path of a .yaml file")]
            )
        if Path(path).is_dir():
            raise RecipeError([top.problem("is a folder", "give the path of a .yaml file in it")])
        data = Path(path).read_bytes()
    except OSError as error:
        raise RecipeError([top.problem(f"cannot be read: {error.strerror}")]) from None
    if len(data) > MAX_BYTES:
        raise RecipeError([top.problem(f"is {len(data):,} bytes long; a recipe has at most {MAX_BYTES:,}")])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError([Problem(file, line, "", "is not UTF-8 text", "save the file as UTF-8")]) from None
    root = _parse(text, Place(file, 1, ""), problems)
    if root is None or root.value is None:
        raise RecipeError(
            [Problem(file, 1, "", "the file is empty", "it needs at least `model`, `data`, `trainer`")]
        )
    if not isinstance(root.value, dict):
        raise RecipeError([Problem(file, 1, "", "holds no keys", "a recipe is made of lines `key: value`")])
    return root


def read_dict(data: Mapping, file: str = "recipe") -> Node:
    """A tree from plain Python values; tuples become lists, paths become text, numpy numbers become numbers."""
    return _from_python(data, Place(file, None, ""))


def read_override(argument: str, problems: list[Problem]) -> tuple[PathKey, Node] | None:
    """`trainer.lr=2e-6` as a path and a value; None, with a problem added, if it cannot be read."""
    place = Place("command line", None, argument)
    name, sign, text = argument.partition("=")
    if argument.startswith("-"):
        problems.append(
            place.problem("no such option", "a recipe's keys are given without dashes, as key=value")
        )
        return None
    if not sign or not name.strip() or not all(part.strip() for part in name.split(".")):
        problems.append(place.problem("is not key=value", "for example trainer.lr=2e-6"))
        return None
    node = _override_value(text.strip(), place, problems)
    if node is None:
        return None
    path = tuple(int(part) if part.isdigit() else part for part in name.strip().split("."))
    return path, _placed(node, place)


def _override_value(text: str, place: Place, problems: list[Problem]) -> Node | None:
    """A list, section or quoted text is YAML; anything else is one scalar, colons and all."""
    if text[:1] not in ("[", "{", "'", '"'):
        return Node(read_scalar(text), place, text=text)
    found: list[Problem] = []
    try:
        node = _parse(text, place, found)
    except RecipeError as error:
        found = error.problems
    if found:
        problems.extend(place.problem(p.message, p.hint) for p in found)
        return None
    return node


def _placed(node: Node, place: Place) -> Node:
    value = node.value
    if isinstance(value, dict):
        value = {key: _placed(child, place) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_placed(child, place) for child in value]
    return replace(node, value=value, place=place)


def read_scalar(text: str) -> Any:
    """What an unquoted YAML scalar means: `8` is a number, `on` is true, everything else is text."""
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except (ValueError, yaml.YAMLError):
        return text


def _parse(text: str, top: Place, problems: list[Problem]) -> Node | None:
    try:
        refused = _refused_features(text, top)
        if refused:
            raise RecipeError(refused)
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _from_yaml(node, top, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = f"{error.problem or ''} {error.context or ''}"
        message = next((m for part, m in _YAML_MESSAGES.items() if part in said), said.strip())
        line = mark.line + 1 if mark is not None and top.line is not None else top.line
        raise RecipeError([replace(top, line=line).problem(f"not valid YAML: {message}")]) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1 if top.line is not None else None
        message = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        raise RecipeError([replace(top, line=line).problem(message, "remove it")]) from None


def _refused_features(text: str, top: Place) -> list[Problem]:
    refused = []
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if top.line is not None else None
        if depth > MAX_DEPTH:
            hint = f"a recipe has at most {MAX_DEPTH} levels"
            return [replace(top, line=line).problem("the file is nested too deeply", hint)]
        if getattr(event, "tag", None) is not None:
            refused.append(
                replace(top, line=line).problem(
                    f"the YAML tag {event.tag!r} is refused", "a recipe is plain values"
                )
            )
        if isinstance(event, yaml.AliasEvent):
            hint = "write ${key} to use another key's value, or put what stages share at the top level"
            refused.append(
                replace(top, line=line).problem(f"the YAML alias *{event.anchor} is refused", hint)
            )
    return refused


def _from_yaml(node: yaml.Node, place: Place, problems: list[Problem]) -> Node:
    def below(key: str | int, at: yaml.Node) -> Place:
        line = at.start_mark.line + 1 if place.line is not None else None
        return Place(place.file, line, place.below(key))

    if isinstance(node, yaml.SequenceNode):
        items = [_from_yaml(child, below(i, child), problems) for i, child in enumerate(node.value)]
        return Node(items, place)
    if isinstance(node, yaml.ScalarNode):
        if node.style is not None:
            return Node(node.value, place)
        return Node(read_scalar(node.value), place, text=node.value)
    children: dict[str, Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            problems.append(below("?", key).problem("a key must be one word", "write `key: value`"))
            continue
        at = below(key.value, key)
        if key.value in children:
            first = children[key.value].place.line
            where = f" (first on line {first})" if first is not None else ""
            problems.append(at.problem(f"is given twice{where}", "keep one"))
            continue
        children[key.value] = _from_yaml(value, at, problems)
    return Node(children, place)


def _from_python(value: Any, place: Place) -> Node:
    if isinstance(value, Mapping):
        children = {
            str(key): _from_python(child, Place(place.file, None, place.below(str(key))))
            for key, child in value.items()
        }
        return Node(children, place)
    if isinstance(value, list | tuple):
        return Node(
            [_from_python(child, Place(place.file, None, place.below(i))) for i, child in enumerate(value)],
            place,
        )
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool | int):
        value = int(value)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool | int | float):
        value = float(value)
    return Node(value, place)
