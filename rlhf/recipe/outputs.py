"""What a stage takes from an earlier one: `path: stage:NAME`.

A model's path may name a stage whose model it is; a dataset's path a `rejection` stage, whose selected responses it
is, as prompts and answers in the form in which the policy met them. Without a name of its own a stage goes on from the
latest earlier stage whose model is of the same line, which began with the same `model.path` or `model.build`, and gives
text. Not here: where a run keeps these files (`rlhf.runtime.run`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf.recipe.rules import SCORING_MODELS, stage_of
from rlhf.recipe.schema import DatasetConfig, ModelConfig, Recipe, TokenizerConfig
from rlhf.recipe.suggest import closest

Data = TypeVar("Data", bound=DatasetConfig)

MODEL_SECTIONS = ("model", "critic", "reward_model", "judge", "reference", "teacher")
SELECTED_FILE = "selected.jsonl"  # of a rejection stage: prompt, response, reward, step
_JUDGED = ("rm", "prm", "dpo", "kto")  # methods whose rows are pairs, labels or steps
# How those rows are read: prompts in it are rendered already, whatever the section says of other sources.
_SELECTED = {
    "task": None,
    "task_args": {},
    "subset": None,
    "split": None,
    "prompt_column": "prompt",
    "prompt_template": None,
    "response_column": "response",
    "messages_column": None,
    "chat_template": False,
    "system_prompt": None,
}


def named_outputs(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """(key, stage) of every path in the recipe that names a stage."""
    paths: dict[tuple[str, ...], str | None] = {
        (section, "path"): getattr(getattr(recipe, section), "path", None) for section in MODEL_SECTIONS
    }
    paths |= {(*key, "path"): data.path for key, data in recipe.training_data.items()}
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
    for kind in ("sets", "pairs", "held_out"):
        for name, data in getattr(recipe.evaluation, kind).items():
            if stage_of(data.path) is not None:
                key = ("evaluation", kind, name, "path")
                yield key, "what a stage selected is its training set's, not held out", "name other rows"
    for key, name in named_outputs(recipe):
        if name not in earlier:
            near = closest(name, list(earlier)) if earlier else None
            known = f"earlier stages: {', '.join(earlier)}" if earlier else "this is the first stage"
            yield key, f"there is no earlier stage {name!r}", f"did you mean {near}?" if near else known
            continue
        method, is_data = earlier[name].method, key[0] not in MODEL_SECTIONS
        scores = method in SCORING_MODELS
        if is_data and method != "rejection":
            yield key, f"stage {name!r} ({method}) writes no data", "name a stage with method: rejection"
        elif is_data and key[0] != "ptx" and recipe.method in _JUDGED:
            message = f"stage {name!r} selects answers, and {recipe.method} needs judged ones"
            yield key, message, "learn from it by sft or distill"
        elif not is_data and key[0] == "reward_model" and not scores:
            yield (
                key,
                f"stage {name!r} ({method}) trains no reward model",
                "name a stage with method: rm or prm",
            )
        elif key[0] == "reward_model" and method == "prm" and not earlier[name].data.step_separator:
            message = f"responses cannot be cut into steps as stage {name!r} reads them: its step_separator is empty"
            yield key, message, f"set data.step_separator in stage {name!r} to what ends every step"
        elif not is_data and key[0] in ("model", "judge", "reference", "teacher") and scores:
            yield key, f"stage {name!r} ({method}) trains a model that gives scores, not text", "name another"


def start_stage(index: int, stages: Sequence[Any]) -> str | None:
    """The stage whose model stage number `index` starts from: the one it names, else the latest earlier one of its line
    that gives text; None if it loads or builds its own.

    `stages` have `name` and `recipe`."""
    model = stages[index].recipe.model
    named = stage_of(model.path)
    if named is not None:
        return named
    for i in reversed(range(index)):
        gives_text = stages[i].recipe.method not in SCORING_MODELS
        if gives_text and _origin(i, stages) == (model.path, model.build):
            return stages[i].name
    return None


def _origin(index: int, stages: Sequence[Any]) -> tuple[str | None, Any]:
    """`model.path` and `model.build` of the stage with which the line of stage number `index` began."""
    model = stages[index].recipe.model
    for i in range(index):
        if stages[i].name == stage_of(model.path):
            return _origin(i, stages)
    return model.path, model.build


def resolve_outputs(recipe: Recipe, start: str | None, folder_of: Callable[[str], Path]) -> Recipe:
    """The recipe with folders in place of stages' names; `folder_of` a stage holds its model and its data."""
    changes: dict[str, Any] = {}
    for section in MODEL_SECTIONS:
        config = getattr(recipe, section)
        name = stage_of(config.path) if config is not None else None
        if name is not None:
            changes[section] = config.model_copy(update={"path": str(folder_of(name) / "model")})
    changes["data"] = _resolve_data(recipe.data, folder_of)
    changes["mix"] = {name: _resolve_data(data, folder_of) for name, data in recipe.mix.items()}
    if recipe.ptx is not None:
        changes["ptx"] = recipe.ptx.model_copy(update={"data": _resolve_data(recipe.ptx.data, folder_of)})
    if start is not None:
        folder = str(folder_of(start) / "model")
        own = recipe.model.model_dump() | {
            "path": folder,
            "build": None,
            "trust_code": None,
            "revision": None,
        }
        changes["model"], changes["tokenizer"] = ModelConfig(**own), TokenizerConfig()
    return recipe.model_copy(update=changes)


def _resolve_data(config: Data, folder_of: Callable[[str], Path]) -> Data:
    name = stage_of(config.path)
    if name is None:
        return config
    return config.model_copy(update={"path": str(folder_of(name) / SELECTED_FILE), **_SELECTED})
