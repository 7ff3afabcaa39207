"""From a recipe file to a plan: read, override, split into stages, resolve, check; and back to text.

A recipe file holds the keys of `Recipe`. With `stages:` (an ordered mapping of names to partial recipes) each stage is
the top level, deep-merged with the stage's own keys: dictionaries key by key, lists and scalars replaced. With `base:` a
file says only what it changes in another one, by the same rule. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rlhf.recipe.check import Checked, Stated, check, misfit
from rlhf.recipe.interpolate import escape, interpolate
from rlhf.recipe.outputs import output_problems
from rlhf.recipe.problems import LookUp, Problem, RecipeError
from rlhf.recipe.reads import without_unread
from rlhf.recipe.schema import Recipe
from rlhf.recipe.secrets import HIDDEN, hides
from rlhf.recipe.suggest import closest
from rlhf.recipe.tree import Node, PathKey, Place, merge, read_dict, read_file, read_override, read_scalar

__all__ = ["Plan", "Problem", "RecipeError", "Stage", "dump_plan", "load_plan", "plan_from_dict"]

SHARED = ("run", "placement", "runtime", "tracking")  # sections that all stages of a run have in common
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")


@dataclass(frozen=True)
class Stage:
    """One training method with its recipe."""

    name: str
    recipe: Recipe
    # Paths whose values came from the environment, with the text they had in the file; a dump shows that text.
    expressions: Mapping[PathKey, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Plan:
    """The stages of a run, in order. They share `run`, `placement`, `runtime` and `tracking`."""

    stages: tuple[Stage, ...]
    source: str | None  # the recipe's path; None for a dictionary
    warnings: tuple[Problem, ...] = ()  # what can be run, but does less than it says


def load_plan(
    path: str | os.PathLike, overrides: Sequence[str] = (), *, look_up: LookUp | None = None
) -> Plan:
    """Read a recipe file and `key=value` overrides.

    An override sets its key: at the top level, or with `stages.NAME.` in one stage. Without `look_up` the recipe is
    checked by itself; with it (`rlhf.recipe.preflight`) also what it names must be there: files, reward functions.
    Raises RecipeError with every problem of the file and of the overrides.
    """
    problems: list[Problem] = []
    root = _read_with_base(path, problems)
    for argument in overrides:
        read = read_override(argument, problems)
        if read is not None:
            root = _override(root, *read, problems)
    return _plan(root, os.fspath(path), problems, look_up)


def plan_from_dict(data: Mapping[str, Any], *, look_up: LookUp | None = None) -> Plan:
    """A plan from plain values, with the same rules as a file. Raises RecipeError."""
    return _plan(read_dict(data), None, [], look_up)


def dump_plan(plan: Plan) -> str:
    """The fully resolved recipe as YAML, every default written out, and the default where a stage has a value from
    elsewhere that it does not read; `load_plan` reads it back.

    Values from the environment appear as their ${oc.env:NAME}, other secrets as "<hidden>".
    """
    if len(plan.stages) == 1 and plan.stages[0].name == plan.stages[0].recipe.method:
        data = _dump_stage(plan.stages[0])
    else:
        stages = {stage.name: _dump_stage(stage) for stage in plan.stages}
        data = {name: next(iter(stages.values()))[name] for name in SHARED}
        data["stages"] = {
            name: {k: v for k, v in keys.items() if k not in SHARED} for name, keys in stages.items()
        }
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


# ---------------------------------------------------------------------------------------------------------------- base


def _read_with_base(path: str | os.PathLike, problems: list[Problem], above: tuple[Path, ...] = ()) -> Node:
    """A file's tree, deep-merged over the tree of its `base:` file, whose path counts from the file's own folder."""
    root = read_file(path, problems)
    base = root.find(("base",))
    if base is None:
        return root
    root = root.put(("base",), None)
    if not isinstance(base.value, str):
        raise RecipeError([base.place.problem("is not the path of a recipe", "write `base: other.yaml`")])
    here = Path(path).resolve()
    if here in above:
        raise RecipeError(
            [base.place.problem(f"{base.value!r} leads back to this file", "remove one `base:`")]
        )
    file = Path(path).parent / base.value
    if not file.is_file():
        raise RecipeError(
            [base.place.problem(f"there is no file {file}", "the path counts from this recipe's folder")]
        )
    return merge(_read_with_base(file, problems, (*above, here)), root)


# ----------------------------------------------------------------------------------------------------------- overrides


def _override(root: Node, path: PathKey, node: Node, problems: list[Problem]) -> Node:
    place = node.place
    stages = root.find(("stages",))
    names = [str(name) for name, _ in stages.children()] if stages is not None else []
    if path[0] == "stages":
        if len(path) < 3 or str(path[1]) not in names:
            problems.append(place.problem(*_no_such_stage(path, names)))
            return root
    elif names and all(stages.find((name, *path)) is not None for name in names):
        ways = " or ".join(f"stages.{name}.{'.'.join(map(str, path))}=..." for name in names)
        problems.append(
            place.problem("every stage sets this key itself, so the top level is not used", f"give {ways}")
        )
        wrong = misfit(path, node)
        problems.extend([wrong] if wrong is not None else [])
        return root
    changed = _set(root, path, node)
    if changed is None:
        problems.append(place.problem("leads into a value that has no keys", "shorten the path"))
        return root
    return changed


def _no_such_stage(path: PathKey, names: list[str]) -> tuple[str, str]:
    if not names:
        return "the recipe has no stages", "leave `stages.NAME.` out"
    near = closest(str(path[1]), names) if len(path) > 1 else None
    if len(path) > 1 and str(path[1]) not in names:
        return (
            f"there is no stage {path[1]!r}",
            f"did you mean {near}?" if near else f"stages: {', '.join(names)}",
        )
    return "names no key of a stage", f"for example stages.{names[0]}.trainer.lr=2e-6"


def _set(root: Node, path: PathKey, node: Node) -> Node | None:
    """With `node` at `path`, making sections on the way; None if a scalar or a list's end is in the way."""
    for i in range(1, len(path)):
        parent = root.find(path[:i])
        if parent is None or parent.value is None:
            if isinstance(root.find(path[: i - 1]).value, list):
                return None
            root = root.put(path[:i], Node({}, node.place))
        elif not isinstance(parent.value, dict | list):
            return None
    parent = root.find(path[:-1])
    if isinstance(parent.value, list) and root.find(path) is None:
        return None
    if isinstance(parent.value, dict):
        path = (*path[:-1], str(path[-1]))
    return root.put(path, node)


# -------------------------------------------------------------------------------------------------------------- stages


def _plan(root: Node, source: str | None, problems: list[Problem], look_up: LookUp | None) -> Plan:
    parts = _split(root, problems)
    stages, found, checked = [], {}, []
    for name, node in parts:
        of_stage: list[Problem] = []
        node = interpolate(node, of_stage)
        result = check(node, look_up)
        found[name] = of_stage + result.problems
        checked.append((name, node, result))
        if result.recipe is not None:
            expressions = {path: n.expression for path, n in node.walk() if n.expression is not None}
            stages.append(Stage(name or result.recipe.method, result.recipe, expressions))
    problems.extend(_name_stages(found))
    problems.extend(_never_read(checked, source))
    if not problems:
        problems.extend(_not_shared(root, stages))
    problems.extend(_outputs(checked))
    if problems:
        raise RecipeError(problems)
    warnings = _name_stages({name: result.warnings for name, _, result in checked})
    return Plan(tuple(stages), source, tuple(warnings))


def _never_read(checked: Sequence[tuple[str, Node, Checked]], source: str | None) -> list[Problem]:
    """Lines that state a setting which no stage reads. What a `base:` file states is that file's own affair: the recipes
    that start from it use different parts of it."""
    ignored: dict[tuple[PathKey, Place], list[tuple[str, Stated]]] = {}
    for name, _, result in checked:
        for stated in result.unread:
            if stated.place.file in (source, "command line", "recipe"):
                ignored.setdefault((stated.path, stated.place), []).append((name, stated))
    problems = []
    for (path, place), stages in ignored.items():
        holders = sum(_is_at(node, path, place) for _, node, _ in checked)
        if holders == len(stages):
            name, nearest = max(stages, key=lambda stage: stage[1].needs)
            text = f"{nearest.problem.message} (in stage {name}, and no other stage reads it)"
            problems.append(replace(nearest.problem, message=text) if holders > 1 else nearest.problem)
    return problems


def _is_at(node: Node, path: PathKey, place: Place) -> bool:
    found = node.find(path)
    return found is not None and found.place == place


def _split(root: Node, problems: list[Problem]) -> list[tuple[str, Node]]:
    """The merged tree of each stage, by name; the name is empty where the file has no stages."""
    stages = root.find(("stages",))
    if stages is None:
        return [("", root)]
    shared = root.put(("stages",), None)
    if not isinstance(stages.value, dict) or not stages.value:
        problems.append(
            stages.place.problem("names no stage", "write `stages:` and under it `NAME:` with its keys")
        )
        return [("", shared)]
    parts = []
    for name, stage in stages.value.items():
        if not _STAGE_NAME.fullmatch(name):
            problems.append(
                stage.place.problem(f"{name!r} is no stage name", "use letters, digits, '_' and '-'")
            )
        own = replace(stage, value={}) if stage.value is None else stage
        if not isinstance(own.value, dict):
            problems.append(stage.place.problem("is not a section of `key: value` lines"))
            continue
        parts.append((name, merge(replace(shared, place=stage.place), own)))
    return parts


def _name_stages(found: Mapping[str, list[Problem]]) -> list[Problem]:
    """Each problem once; with its stages' names where it is not in every stage and its key does not say so."""
    where: dict[Problem, list[str]] = {}
    for name, problems in found.items():
        for problem in problems:
            where.setdefault(problem, []).append(name)
    return [
        problem
        if len(names) == len(found) or problem.key.startswith("stages.")
        else replace(problem, message=f"{problem.message} (in stage {', '.join(names)})")
        for problem, names in where.items()
    ]


def _outputs(checked: Sequence[tuple[str, Node, Checked]]) -> list[Problem]:
    """Stages that a path names and that are not there, or have nothing of the kind. Nothing is said that hangs on a value
    which something else is wrong with."""
    problems = []
    earlier: dict[str, Recipe] = {}
    unclear = False
    for name, node, result in checked:
        for key, message, hint in output_problems(result.repaired, earlier):
            at = node.find(key)
            if at is not None and not unclear:
                problems.append(at.place.problem(message, hint))
        earlier[name or result.repaired.method] = result.repaired
        unclear = unclear or any(path[0] in ("method", "data") for path in result.dropped)
    return problems


def _not_shared(root: Node, stages: Sequence[Stage]) -> list[Problem]:
    problems = []
    for stage in stages[1:]:
        for section in SHARED:
            if getattr(stage.recipe, section) != getattr(stages[0].recipe, section):
                own = [root.find(("stages", s.name, section)) for s in (stage, stages[0])]
                place = next(node.place for node in own if node is not None)
                message = f"all stages of a run share `{section}`, but it differs in {stages[0].name!r} and {stage.name!r}"
                problems.append(place.problem(message, f"move {section} to the top level"))
    return problems


# ---------------------------------------------------------------------------------------------------------------- dump


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that would be read back as something else; PyYAML alone leaves 1e5 bare."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(read_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _dump_stage(stage: Stage) -> dict[str, Any]:
    return _dump_value(without_unread(stage.recipe).model_dump(mode="json"), (), stage.expressions)


def _dump_value(value: Any, path: PathKey, expressions: Mapping[PathKey, str]) -> Any:
    if path in expressions:
        return expressions[path]
    if isinstance(value, dict):
        return {key: _dump_value(child, (*path, key), expressions) for key, child in value.items()}
    if isinstance(value, list):
        return [_dump_value(child, (*path, i), expressions) for i, child in enumerate(value)]
    if hides(path, value):
        return HIDDEN
    return escape(value) if isinstance(value, str) else value
