"""What an unknown key was meant to be: a neighbour misspelt, a key of another section, or another framework's name."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from functools import cache

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf.recipe.schema import Recipe
from rlhf.recipe.tree import PathKey

SchemaPath = tuple[str, ...]  # field names; "*" stands for a name or index of the user's own

# Names that other frameworks give to our keys.
SYNONYMS: dict[str, str] = {
    "learning_rate": "trainer.lr",
    "max_steps": "trainer.steps",
    "total_steps": "trainer.steps",
    "num_train_epochs": "trainer.epochs",
    "num_epochs": "trainer.epochs",
    "batch_size": "trainer.prompts_per_step",
    "train_batch_size": "trainer.prompts_per_step",
    "lr_scheduler_type": "trainer.schedule",
    "gradient_clipping": "trainer.max_grad_norm",
    "num_minibatches": "trainer.minibatches_per_step",
    "ppo_epochs": "trainer.passes_per_step",
    "num_iterations": "trainer.passes_per_step",
    "num_generations": "rollout.group_size",
    "num_samples": "rollout.group_size",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_completion_length": "rollout.max_response_tokens",
    "max_response_length": "rollout.max_response_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "beta": "algorithm.kl_coef",
    "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "loss_type": "algorithm.aggregation",
    "adv_estimator": "algorithm.advantage",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "dataset_name": "data.path",
    "reward_funcs": "reward",
    "report_to": "tracking.wandb",
}


def sections(annotation: object) -> Iterator[tuple[SchemaPath, type[BaseModel]]]:
    """The section models inside a type: `GroupConfig` itself, or under "*" in a list or dictionary of them."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
    elif origin is typing.Annotated:
        yield from sections(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from sections(argument)
    elif origin in (list, dict):
        for path, model in sections(arguments[-1]):
            yield ("*", *path), model


@cache
def schema() -> dict[SchemaPath, FieldInfo]:
    """Every key of a recipe."""
    keys: dict[SchemaPath, FieldInfo] = {}

    def add(model: type[BaseModel], path: SchemaPath) -> None:
        for name, field in model.model_fields.items():
            keys[(*path, name)] = field
            for below, section in sections(field.annotation):
                add(section, (*path, name, *below))

    add(Recipe, ())
    return keys


def schema_path(path: PathKey) -> SchemaPath:
    """The schema's path of a key in a recipe: the user's own names and list indices become "*"."""
    known: SchemaPath = ()
    for key in path:
        named = (*known, str(key))
        wild = (*known, "*")
        known = wild if named not in schema() and any(p[: len(wild)] == wild for p in schema()) else named
    return known


def field_at(path: PathKey) -> FieldInfo | None:
    return schema().get(schema_path(path))


def siblings(path: PathKey) -> list[str]:
    """The keys that may stand where this one does."""
    parent = schema_path(path[:-1])
    return [p[-1] for p in schema() if p[:-1] == parent and p[-1] != "*"]


def distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn one word into the other."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def closest(word: str, choices: list[str]) -> str | None:
    """The choice that `word` most likely misspells; None if none is near."""
    ranked = sorted((_far(word, choice), -_common_start(word, choice), choice) for choice in choices)
    return ranked[0][2] if ranked and ranked[0][0] <= _allowed(word) else None


def did_you_mean(near: str | None, otherwise: str) -> str:
    """A hint: the near name, or else what there is."""
    return f"did you mean {near}?" if near is not None else otherwise


def meant(path: PathKey) -> list[PathKey]:
    """Full paths that an unknown key may have meant, the likeliest first; empty if nothing is near.

    Another framework's name of a key of this very section comes first, then a neighbour's misspelling, unless the word is
    exactly a key (or another framework's name of a key) that lives elsewhere.
    """
    word = str(path[-1])
    near = closest(word, siblings(path))
    if near is not None and _far(word, near) == 0:
        return [(*path[:-1], near)]
    synonym = SYNONYMS.get(_plain(word), SYNONYMS.get(word.lower()))
    if synonym and len(path) > 1 and synonym.split(".")[:-1] == [path[-2]]:
        return [(*path[:-1], synonym.split(".")[-1])]
    exact = _elsewhere(word, limit=0)
    if exact:
        return exact
    if near is None and synonym:
        return [tuple(synonym.split("."))]
    if near is not None:
        return [(*path[:-1], near)]
    return _elsewhere(word, limit=_allowed(word)) if len(word) > 3 else []


def _elsewhere(word: str, limit: int) -> list[PathKey]:
    """Keys of any section whose name is near, the nearest only, those with a definite place first."""
    ranked: dict[int, list[SchemaPath]] = {}
    for path in schema():
        far = _far(word, path[-1])
        if far <= limit:
            ranked.setdefault(far, []).append(path)
    if not ranked:
        return []
    return sorted(ranked[min(ranked)], key=lambda p: ("*" in p, len(p)))[:3]


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").strip("_ ")


def _far(word: str, choice: str) -> int:
    """Distance without case, hyphens and underscores: maxGradNorm is max_grad_norm."""
    return distance(_plain(word).replace("_", ""), choice.lower().replace("_", ""))


def _allowed(word: str) -> int:
    return max(1, round(len(_plain(word)) * 0.3))


def _common_start(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
