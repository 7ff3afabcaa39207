"""A tree against the schema: every mistake at once, in plain words.

pydantic finds the mistakes; this module puts each on its line, says it in a sentence, and repairs or drops the value
in a copy, so that the cross-checks of `Recipe`, which need a whole recipe, still run and are reported with the rest.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from rlhf.recipe import rules
from rlhf.recipe.problems import Fault, LookUp, Problem
from rlhf.recipe.reads import unread
from rlhf.recipe.schema import Recipe
from rlhf.recipe.secrets import HIDDEN, hides
from rlhf.recipe.suggest import closest, field_at, meant, schema, siblings
from rlhf.recipe.tree import Node, PathKey, Place, merge

# Stands in for a required section that is missing or wrong, so that the other sections are still checked.
_STAND_INS: dict[PathKey, dict] = {("data",): {"path": "stand/in"}}


@dataclass(frozen=True)
class Stated:
    """A setting that a recipe states and that nothing in it reads. Another stage may read the same line."""

    path: PathKey
    place: Place
    needs: int  # how many of the setting's needs hold before the first that does not
    problem: Problem


@dataclass(frozen=True)
class Checked:
    repaired: Recipe  # with defaults in place of what is wrong
    dropped: Set[PathKey]  # what they are in place of
    problems: list[Problem]
    warnings: list[Problem]  # of a recipe that can be run, but does less than it says
    unread: list[Stated]

    @property
    def recipe(self) -> Recipe | None:
        """None if anything is wrong with it."""
        return None if self.problems else self.repaired


def check(root: Node, look_up: LookUp | None = None) -> Checked:
    """The recipe and what is wrong with it. `look_up` adds what is wrong outside the recipe, and sees a recipe even where
    values are wrong: a repaired one.
    """
    problems: list[Problem] = []
    dropped: set[PathKey] = set()
    node = root
    for path, found in reversed(list(root.walk())):
        message = _misread(path, found.value)
        if message:
            problems.append(found.place.problem(message, _about(path)))
            node, dropped = _drop(node, path), dropped | {path}
    while True:
        try:
            recipe = Recipe.model_validate(node.plain())
            break
        except ValidationError as error:
            errors = error.errors(include_url=False)
        if errors[0]["type"] == "inconsistent":
            problems += _inconsistent(node, errors[0]["ctx"]["problems"], dropped)
            recipe = _section_by_section(node)
            break
        repaired, found, dropped = _one_round(node, errors, dropped)
        problems.extend(found)
        assert repaired is not node, f"no progress on {errors}"
        node = repaired
    if look_up is not None:
        problems += _placed(node, look_up(recipe), dropped)
    ignored = _unread(node, recipe, problems, dropped)
    if problems:
        return Checked(recipe, dropped, problems, [], ignored)
    warnings = _inconsistent(node, list(rules.warnings(recipe)), dropped)
    return Checked(recipe, dropped, [], warnings, ignored)


def _unread(node: Node, recipe: Recipe, problems: Sequence[Problem], dropped: set[PathKey]) -> list[Stated]:
    """What nothing reads, without what something else is wrong with, and what depends on values that were taken out."""
    known = {(p.file, p.line, p.key) for p in problems}
    found = []
    for setting in unread(recipe):
        at = node.find(setting.key)
        decided_by = [setting.key, *(tuple(key.split(".")) for key in setting.keys)]
        if at is None or any(_touches(path, dropped) for path in decided_by):
            continue
        message = f"{_show(node, setting.key)} is read by nothing {setting.lack}"
        problem = at.place.problem(message, f"remove it, or {setting.way}")
        if (problem.file, problem.line, problem.key) not in known:
            found.append(Stated(setting.key, at.place, setting.needs, problem))
    return found


def _section_by_section(node: Node) -> Recipe:
    """The recipe of a tree whose sections are valid, without the checks between them."""
    values = {
        name: TypeAdapter(Recipe.model_fields[str(name)].annotation).validate_python(child.plain())
        for name, child in node.children()
    }
    return Recipe.model_construct(**values)


def _placed(node: Node, faults: Sequence[Fault], dropped: set[PathKey]) -> list[Problem]:
    """Faults on their lines, without those that only come from values that were taken out."""
    problems = []
    for fault in faults:
        if any(_is_gone(node, key, dropped) for key in fault.keys):
            continue
        place = node.nearest(fault.keys[0]).place
        exact = node.find(fault.keys[0]) is not None or place.file == "command line"
        rest = [] if exact else fault.keys[0][len(node.way(fault.keys[0])) :]
        key = ".".join(map(str, [place.key, *rest] if place.key else rest))
        message, hint = (_without_environment(node, fault.keys, text) for text in (fault.message, fault.hint))
        problems.append(Problem(place.file, place.line, key, message, hint))
    return problems


def _without_environment(node: Node, keys: Sequence[PathKey], text: str) -> str:
    """The text with values from the environment as the recipe writes them: ${oc.env:NAME}."""
    for key in keys:
        at = node.find(key)
        for found in [n for _, n in at.walk() if n.expression is not None] if at is not None else []:
            text = text.replace(str(found.value), found.expression)
    return text


def _is_gone(node: Node, path: PathKey, dropped: set[PathKey]) -> bool:
    """Was the value there taken out? In a list the entries after it have moved up: what is there is what counts."""
    if any(isinstance(key, int) for key in path) and node.find(path) is not None:
        return False
    return _touches(path, dropped)


def _one_round(
    node: Node, errors: list[dict], dropped: set[PathKey]
) -> tuple[Node, list[Problem], set[PathKey]]:
    """Report one validation's errors; the tree without their causes, and the paths that were taken out of it."""
    grouped: dict[PathKey, list[dict]] = {}
    for error in errors:
        grouped.setdefault(_path(node, error), []).append(error)
    problems: list[Problem] = []
    dropped = set(dropped)
    unknown = [path for path, found in grouped.items() if found[0]["type"] == "extra_forbidden"]
    repaired = node
    for path in unknown:
        problem, repaired, uncertain = _unknown(repaired, path)
        problems.append(problem)
        dropped |= uncertain
    # From the end, so that removing an entry of a list does not move those still to be looked at.
    for path in sorted(grouped.keys() - set(unknown), reverse=True):
        found = grouped[path]
        word = _as_written(node, path, found)
        if word is not None:
            repaired = repaired.put(path, word)
            continue
        if not _is_consequence(path, found, dropped):
            problems.append(_wrong(node, path, found))
        repaired = _drop(repaired, path)
        dropped.add(path)
    return repaired, problems, dropped


def _path(root: Node, error: dict) -> PathKey:
    """pydantic's location without its names of union members."""
    path: PathKey = ()
    for i, part in enumerate(error["loc"]):
        node = root.find(path)
        exists = node is not None and part in dict(node.children())
        names_absent = i + 1 == len(error["loc"]) and error["type"] in ("missing", "extra_forbidden")
        if exists or names_absent:
            path = (*path, part)
    return path


def _drop(node: Node, path: PathKey) -> Node:
    """Without the value at `path`; where it is a required one, without the section that requires it."""
    if path in _STAND_INS:
        children = {key: Node(value, node.place) for key, value in _STAND_INS[path].items()}
        return node.put(path, Node(children, node.place))
    if node.find(path[:-1]) is None:
        return node  # gone already, with its section
    field = field_at(path)
    required = field is not None and field.is_required() and len(path) > 1
    is_entry = isinstance(path[-1], int) and isinstance(node.find(path[:-1]).value, list)
    if required or (is_entry and path[-1] >= len(node.find(path[:-1]).value)):
        return _drop(node, path[:-1])
    return node.put(path, None)


def _is_consequence(path: PathKey, found: list[dict], dropped: set[PathKey]) -> bool:
    """Would this mistake not be there, had nothing been taken out?"""
    below = [d for d in dropped if d[: len(path)] == path]
    if found[0]["type"] in ("missing", "too_short"):
        return bool(below)
    return any(str(d[-1]) in found[0]["msg"] for d in below)


# ------------------------------------------------------------------------------------------------------------- values


def _kinds(annotation: object) -> set[object]:
    """The types that a field accepts, lists and unions taken apart; a Literal gives its values' types."""
    if typing.get_origin(annotation) is typing.Literal:
        return {type(v) for v in typing.get_args(annotation)}
    arguments = typing.get_args(annotation)
    return set().union(*(_kinds(a) for a in arguments)) if arguments else {annotation}


def _misread(path: PathKey, value: Any) -> str:
    """What pydantic would let pass: true where a number is wanted, and numbers that are none."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, bool):
        field = field_at(path if isinstance(path[-1], str) else path[:-1])
        kinds = _kinds(field.annotation) if field is not None else set()
        if kinds & {int, float} and not kinds & {bool, Any}:
            return f"{_show_plain(value)} is not a number"
    return ""


def _as_written(node: Node, path: PathKey, found: list[dict]) -> Node | None:
    """The unquoted word itself, where YAML read `off` or `2026` as something else and the field wants that word."""
    at = node.find(path)
    if at is None or at.text is None or at.value is None or isinstance(at.value, str):
        return None
    for error in found:
        wanted = repr(at.text) in error["ctx"]["expected"] if error["type"] == "literal_error" else None
        if wanted or error["type"] == "string_type":
            return Node(at.text, at.place, expression=at.expression)
    return None


def _plural(count: int) -> str:
    return f"{count} entr{'y' if count == 1 else 'ies'}"


_RULES: dict[str, Callable[[Mapping], str]] = {
    "int_type": lambda ctx: "a whole number",
    "int_parsing": lambda ctx: "a whole number",
    "int_parsing_size": lambda ctx: "a whole number of this size",
    "int_from_float": lambda ctx: "a whole number",
    "float_type": lambda ctx: "a number",
    "float_parsing": lambda ctx: "a number",
    "bool_type": lambda ctx: "true or false",
    "bool_parsing": lambda ctx: "true or false",
    "string_type": lambda ctx: "text",
    "list_type": lambda ctx: "a list",
    "tuple_type": lambda ctx: "a list",
    "dict_type": lambda ctx: "a section of `name: value` lines",
    "model_type": lambda ctx: "a section of `key: value` lines",
    "literal_error": lambda ctx: "one of " + ctx["expected"].replace("'", "").replace(" or ", ", "),
    "greater_than": lambda ctx: f"above {ctx['gt']:g}",
    "greater_than_equal": lambda ctx: f"at least {ctx['ge']:g}",
    "less_than": lambda ctx: f"below {ctx['lt']:g}",
    "less_than_equal": lambda ctx: f"at most {ctx['le']:g}",
    "finite_number": lambda ctx: "a finite number",
    "string_pattern_mismatch": lambda ctx: f"of the form {ctx['pattern']}",
    "too_short": lambda ctx: f"a list of at least {_plural(ctx['min_length'])}",
    "too_long": lambda ctx: f"a list of at most {_plural(ctx['max_length'])}",
}


def rule(error: Mapping[str, Any]) -> str:
    """What one of pydantic's errors says that a value must be: "a whole number", "at least 1"."""
    kind = error["type"]
    return _RULES[kind](error["ctx"] if "ctx" in error else {}) if kind in _RULES else error["msg"]


def _wrong(node: Node, path: PathKey, found: list[dict]) -> Problem:
    kind = found[0]["type"]
    at = node.find(path)
    if kind == "missing":
        parent = node.nearest(path).place
        file_key = parent.below(path[-1]) if parent.file != "command line" else parent.key
        return Problem(parent.file, parent.line, file_key, _missing(path), _about(path))
    place = node.nearest(path).place
    if kind == "value_error":
        return place.problem(_line(str(found[0]["ctx"]["error"])))
    if at is not None and at.value is None:
        return place.problem("is empty", _about(path) or "remove the line or give it a value")
    if found[0]["loc"][-1] == "[key]":  # pydantic's, of a dictionary whose keys are a choice
        message = f"{path[-1]} is not {rule(found[0])}"
        return place.problem(message, _nearest_choice(Node(path[-1], place), found))
    message = f"{_show(node, path)} is not {' or '.join(dict.fromkeys(map(rule, found)))}"
    return place.problem(message, _nearest_choice(at, found) or _about(path))


def _missing(path: PathKey) -> str:
    return (
        "is missing"
        if isinstance(path[-1], str)
        else f"has too few entries: number {path[-1] + 1} is missing"
    )


def _nearest_choice(at: Node | None, found: list[dict]) -> str:
    for error in found:
        if error["type"] == "literal_error" and at is not None and isinstance(at.value, str):
            near = closest(at.value, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
            if near:
                return f"did you mean {near}?"
    return ""


def _about(path: PathKey) -> str:
    """The schema's line about a key, and its default."""
    field = field_at(path) or (field_at(path[:-1]) if path else None)
    if field is None or not field.description:
        return ""
    text = _line(field.description).rstrip(".")
    simple = field.default is not PydanticUndefined and field.default is not None
    return f"{text} (default {_show_plain(field.default)})" if simple else text


def misfit(path: PathKey, node: Node) -> Problem | None:
    """What is wrong with a value by itself, wherever it is put; None where that cannot be told: an unknown key, a value
    that ${...} fills in later, a secret."""
    field, value = field_at(path), node.plain()
    if field is None or "${" in str(value) or hides(path, value):
        return None
    try:
        TypeAdapter(Annotated[field.annotation, field]).validate_python(value)
    except ValidationError as error:
        kinds = dict.fromkeys(map(rule, error.errors(include_url=False)))
        return node.place.problem(f"{_show_plain(value)} is not {' or '.join(kinds)}", _about(path))
    return None


def _line(text: str) -> str:
    """On one line, however the schema's source breaks it."""
    return " ".join(text.split())


def _show(node: Node, path: PathKey) -> str:
    """The value as the user wrote it, without secrets."""
    at = node.find(path)
    if at is None:
        return "this"
    if any(n.expression is not None for _, n in at.walk()):
        return at.expression or HIDDEN
    if hides(path, at.value) or not isinstance(at.value, str | int | float | list):
        return HIDDEN if isinstance(at.value, str) else "this section"
    return _show_plain(at.plain())


def _show_plain(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -------------------------------------------------------------------------------------------------------- unknown keys


def _unknown(node: Node, path: PathKey) -> tuple[Problem, Node, set[PathKey]]:
    """The problem, the tree with the key where it was meant to be, and the paths about which nothing is known now."""
    at = node.find(path)
    assert at is not None, path
    without = node.put(path, None)
    dotted = tuple(str(path[-1]).split("."))
    if len(dotted) > 1 and (*path[:-1], *dotted) in schema():
        hint = f"dots are for the command line; here write {dotted[-1]} under {'.'.join(dotted[:-1])}"
        targets: list[PathKey] = [(*path[:-1], *dotted)]
    else:
        targets = meant(path)
        hint = _did_you_mean(path, targets, at.place.key)
    problem = at.place.problem("unknown key", hint)
    if len(targets) == 1 and "*" not in targets[0]:
        moved = _move(without, targets[0], at)
        if moved is not None:
            return problem, moved, set()
    unclear = {tuple(t[: t.index("*")]) for t in targets if "*" in t}
    unclear |= {t for t in targets if "*" not in t and without.find(t) is None}  # what is stated is known
    return problem, without, unclear


def _move(node: Node, target: PathKey, value: Node) -> Node | None:
    """With `value` at `target`, merged with a section that is there; None if another value is there or in the way."""
    for i in range(1, len(target)):
        parent = node.find(target[:i])
        if parent is None:
            node = node.put(target[:i], Node({}, value.place))
        elif not isinstance(parent.value, dict):
            return None
    there = node.find(target)
    if there is None:
        return node.put(target, value)
    both_sections = isinstance(there.value, dict) and isinstance(value.value, dict)
    return node.put(target, merge(value, there)) if both_sections else None


def _did_you_mean(path: PathKey, targets: list[PathKey], written: str) -> str:
    if not targets:
        known = ", ".join(siblings(path))
        return f"known here: {known}" if known else "remove it"
    stage = re.match(r"stages\.[^.=]+\.", written)
    names = [
        (stage.group(0) if stage else "") + ".".join(map(str, t)).replace("*", "<name>") for t in targets
    ]
    if targets[0][:-1] == path[:-1]:
        return f"did you mean {names[0]}?"
    if targets[0][-1] == path[-1]:
        return f"it belongs elsewhere: did you mean {' or '.join(names)}?"
    return f"did you mean {' or '.join(names)}?"


# ------------------------------------------------------------------------------------------------------ between sections


def _inconsistent(
    node: Node, found: list[tuple[tuple[str, ...], str]], dropped: set[PathKey]
) -> list[Problem]:
    """The cross-checks' problems, without those that only come from values that were taken out."""
    problems = []
    for keys, message in found:
        paths = [tuple(key.split(".")) for key in keys]
        if any(_touches(path, dropped) for path in paths):
            continue
        at = node.nearest(paths[0])
        exact = node.find(paths[0]) is not None
        key = at.place.key if exact else keys[0]
        problems.append(Problem(at.place.file, at.place.line, key, message))
    return problems


def _touches(path: PathKey, dropped: set[PathKey]) -> bool:
    return any(d[: len(path)] == path or path[: len(d)] == d for d in dropped)
