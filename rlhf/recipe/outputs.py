"""What a stage takes from an earlier one: `path: stage:NAME`.

A model's path may name a stage whose model it is; a dataset's path a `rejection` stage, whose selected responses it
is. Without a name of its own a stage starts from the model of the latest earlier stage that trained the same model
and gives text. Not here: where a run keeps these files (`rlhf.runtime.run`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.recipe.rules import SCORING_MODELS
from rlhf.recipe.schema import ModelConfig, Recipe, TokenizerConfig
from rlhf.recipe.suggest import closest

_PREFIX = "stage:"
MODEL_SECTIONS = ("model", "critic", "reward_model", "reference", "teacher")
SELECTED_FILE = "selected.jsonl"  # of a rejection stage: prompt and response


def stage_of(path: str | None) -> str | None:
    """The stage that a path names, None for a path of another kind."""
    return path.removeprefix(_PREFIX) if path is not None and path.startswith(_PREFIX) else None


def named_outputs(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """(key, stage) of every path in the recipe that names a stage."""
    paths: dict[tuple[str, ...], str | None] = {
        (section, "path"): getattr(getattr(recipe, section), "path", None) for section in MODEL_SECTIONS
    }
    paths[("data", "path")] = recipe.data.path
    if recipe.ptx is not None:
        paths[("ptx", "data", "path")] = recipe.ptx.data.path
    for key, path in paths.items():
        stage = stage_of(path)
        if stage is not None:
            yield key, stage


def output_problems(
    recipe: Recipe, earlier: Mapping[str, Recipe]
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(key, what is wrong, hint) for names that are no earlier stage, or one with another kind of output."""
    for key, name in named_outputs(recipe):
        if name not in earlier:
            near = closest(name, list(earlier)) if earlier else None
            known = f"earlier stages: {', '.join(earlier)}" if earlier else "this is the first stage"
            yield key, f"there is no earlier stage {name!r}", f"did you mean {near}?" if near else known
            continue
        method, is_data = earlier[name].method, "data" in key
        scores = method in SCORING_MODELS
        if is_data and method != "rejection":
            yield key, f"stage {name!r} ({method}) writes no data", "name a stage with method: rejection"
        elif not is_data and key[0] == "reward_model" and not scores:
            yield key, f"stage {name!r} ({method}) trains no reward model", "name a stage with method: rm"
        elif not is_data and key[0] in ("model", "reference", "teacher") and scores:
            yield key, f"stage {name!r} ({method}) trains a model that gives scores, not text", "name another"


def start_stage(index: int, stages: Sequence[Any]) -> str | None:
    """The stage whose model stage number `index` starts from; None if it loads or builds its own.

    `stages` have `name` and `recipe`."""
    here = stages[index].recipe
    named = stage_of(here.model.path)
    if named is not None:
        return named
    for before in reversed(stages[:index]):
        model = before.recipe.model
        same = (here.model.path, here.model.build) == (model.path, model.build)
        if same and before.recipe.method not in SCORING_MODELS:
            return before.name
    return None


def resolve_outputs(recipe: Recipe, start: str | None, folder_of: Callable[[str], Path]) -> Recipe:
    """The recipe with folders in place of stages' names; `folder_of` a stage holds its model and its data."""
    changes: dict[str, Any] = {}
    for key, name in named_outputs(recipe):
        if key[0] in MODEL_SECTIONS:
            section = getattr(recipe, key[0])
            changes[key[0]] = section.model_copy(update={"path": str(folder_of(name) / "model")})
        elif key[0] == "data":
            changes["data"] = recipe.data.model_copy(update={"path": str(folder_of(name) / SELECTED_FILE)})
        else:
            data = recipe.ptx.data.model_copy(update={"path": str(folder_of(name) / SELECTED_FILE)})
            changes["ptx"] = recipe.ptx.model_copy(update={"data": data})
    if start is not None:
        folder = str(folder_of(start) / "model")
        own = recipe.model.model_dump() | {"path": folder, "build": None, "trust_code": None, "revision": None}
        changes["model"], changes["tokenizer"] = ModelConfig(**own), TokenizerConfig()
    return recipe.model_copy(update=changes)
