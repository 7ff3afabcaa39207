"""${key} and ${oc.env:NAME} in a recipe, resolved by OmegaConf.

Only these two forms are allowed: other resolvers compute or decode, and a recipe is data. What came from the
environment keeps its expression, so that a dump shows ${oc.env:NAME} and never the value.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from omegaconf import Container, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from rlhf.recipe.problems import Problem
from rlhf.recipe.tree import Node, PathKey, read_scalar

_OPENING = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_KEY = re.compile(r"\$\{\s*\.*[A-Za-z_][\w-]*(?:\.[\w-]+|\[[\w-]+\])*\s*\}")
_ENV = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)\s*(?:,[^${}]*)?\}")


def has_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def interpolate(root: Node, problems: list[Problem]) -> Node:
    """The tree with every interpolation replaced by its value; what cannot be resolved is reported and left out."""
    found = [(path, node) for path, node in root.walk() if has_interpolation(node.value)]
    if not found:
        return root
    resolved = root
    allowed = []
    for path, node in reversed(found):
        if _is_allowed(node.value):
            allowed.append((path, node))
        else:
            message = f"in {node.value!r} only ${{key}} and ${{oc.env:NAME}} may be used"
            problems.append(node.place.problem(message, r"write \${ for the characters themselves"))
            resolved = resolved.put(path, None)
    config = OmegaConf.create(resolved.plain(), flags={"allow_objects": True})
    secret = _reading_environment(allowed)
    for path, node in allowed:
        try:
            value = _select(config, path)
        except (OmegaConfBaseException, RecursionError) as error:
            problems.append(node.place.problem(*_explain(node.value, error)))
            resolved = resolved.put(path, None)
        else:
            resolved = resolved.put(path, _resolved(value, node, node.value if path in secret else None))
    return resolved


def escape(text: str) -> str:
    """Text that reads back as itself although it contains `${`."""
    return re.sub(r"(\\*)\$\{", lambda m: m.group(1) * 2 + r"\${", text)


def _is_allowed(text: str) -> bool:
    openings = [match.end() - 2 for match in _OPENING.finditer(text)]
    return all(_KEY.match(text, at) or _ENV.match(text, at) for at in openings)


def _explain(text: str, error: Exception) -> tuple[str, str]:
    unset = next((name for name in _ENV.findall(text) if repr(name) in str(error)), None)
    if unset:
        hint = f"set it, or write ${{oc.env:{unset},a default}}"
        return f"the environment variable {unset} is not set", hint
    if isinstance(error, InterpolationKeyError):
        return f"{text!r} refers to a key that the recipe does not set", "write that key, or the value itself"
    if isinstance(error, RecursionError):
        return f"{text!r} refers to itself", "write the value itself"
    return f"{text!r} cannot be resolved", "write the value itself"


def _select(config: Container, path: PathKey) -> Any:
    node: Any = config
    for key in path:
        node = node[key]
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, Container) else node


def _resolved(value: Any, node: Node, expression: str | None) -> Node:
    if isinstance(value, dict):
        return Node(
            {str(k): _resolved(v, node, None) for k, v in value.items()}, node.place, expression=expression
        )
    if isinstance(value, list):
        return Node([_resolved(v, node, None) for v in value], node.place, expression=expression)
    if isinstance(value, str) and _ENV.fullmatch(node.value):
        return Node(read_scalar(value), node.place, text=value, expression=expression)
    return replace(node, value=value, text=None, expression=expression)


def _reading_environment(found: list[tuple[PathKey, Node]]) -> set[PathKey]:
    """Paths whose value comes from the environment, directly or through other keys."""
    secret = {path for path, node in found if _ENV.search(node.value)}
    while True:
        more = {path for path, node in found if path not in secret and _refers_into(path, node.value, secret)}
        if not more:
            return secret
        secret |= more


def _refers_into(path: PathKey, text: str, secret: set[PathKey]) -> bool:
    for match in _KEY.finditer(text):
        target = _target(path, match.group(0)[2:-1].strip())
        if any(target[: len(s)] == s or s[: len(target)] == target for s in secret):
            return True
    return False


def _target(path: PathKey, reference: str) -> PathKey:
    dots = len(reference) - len(reference.lstrip("."))
    base = path[: len(path) - dots] if dots else ()
    parts = re.findall(r"[\w-]+", reference)
    return (*base, *(int(p) if p.isdigit() else p for p in parts))
