"""The Python API: a trainer per method, over the same recipe schema and the same code path as the command line.

    from rlhf import GRPOTrainer

    trainer = GRPOTrainer("Qwen/Qwen3-0.6B", train_dataset=rows, reward=my_reward, group_size=8, lr=1e-6, steps=100)
    trainer.train()

Keyword settings are the recipe's fields by their own names (`lr`, `group_size`, `max_response_tokens`, ...); a whole
section can be given as a dict (`rollout={"top_p": 0.9}`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.schema import Recipe
from rlhf.recipe.suggest import SYNONYMS, closest

# Sections whose fields may be given as plain keywords; where two hold the same name, the first one gets it.
_SECTIONS = ("trainer", "algorithm", "rollout", "run", "model", "runtime", "tracking", "data", "evaluation")
IN_MEMORY = "in-memory"

Reward = str | Callable[..., list[float | None]]


class _Trainer:
    method: str

    def __init__(
        self,
        model: Any,
        *,
        train_dataset: Any,
        reward: Reward | Sequence[Reward] | Mapping[str, Reward] = (),
        eval_dataset: Any = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> None:
        """`model`: a folder or hub name, or a transformers model (then `tokenizer` too). `train_dataset`: a path or hub
        name, or rows (a list of dicts or a `datasets.Dataset`). `reward`: `fn(prompts, responses, **columns) ->
        list[float | None]`, the name of a built-in rule, or several of them.

        Raises RecipeError (all problems at once) for settings that do not fit, before any model loads.
        """
        from rlhf.runtime.run import Objects

        recipe = _sections(settings)
        recipe["method"] = self.method
        recipe.setdefault("run", {}).setdefault("name", f"{self.method}-{time.strftime('%Y%m%d-%H%M%S')}")
        rewards, functions = _rewards(reward)
        if rewards:
            recipe["reward"] = rewards
        train_rows = _dataset(recipe.setdefault("data", {}), train_dataset)
        eval_rows = {}
        if eval_dataset is not None:
            eval_set = {k: v for k, v in recipe["data"].items() if k != "path"}
            rows = _dataset(eval_set, eval_dataset)
            recipe.setdefault("evaluation", {}).setdefault("sets", {})["eval"] = eval_set
            eval_rows = {"eval": rows} if rows is not None else {}
        if isinstance(model, str | Path):
            recipe.setdefault("model", {})["path"] = str(model)
        else:
            if tokenizer is None:
                raise ValueError("a model object needs its tokenizer: pass tokenizer=")
            recipe.setdefault("model", {})["path"] = IN_MEMORY
            recipe["model"].setdefault("dtype", str(model.dtype).removeprefix("torch."))
        self.plan = plan_from_dict(recipe)
        self._objects = Objects(
            model=None if isinstance(model, str | Path) else model,
            tokenizer=tokenizer,
            train_rows=train_rows,
            eval_rows=eval_rows,
            reward_functions=functions,
        )

    @property
    def recipe(self) -> Recipe:
        return self.plan.stages[0].recipe

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run.output_dir) / self.recipe.run.name

    def train(self) -> Path:
        """Train to the end, or go on where an interrupted run of this name stopped. Returns the model's folder.

        Raises what stopped the run; the run directory holds everything up to the last checkpoint.
        """
        from rlhf.runtime.run import train_plan

        return train_plan(self.plan, objects=self._objects)


class GRPOTrainer(_Trainer):
    """Group-relative policy optimisation (arXiv 2402.03300) and its family; see `rlhf.trainers.grpo`."""

    method = "grpo"


class SFTTrainer(_Trainer):
    """Supervised fine-tuning on the answers in `response_column`; see `rlhf.trainers.sft`."""

    method = "sft"


def _sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"lr": 1e-6} -> {"trainer": {"lr": 1e-6}}. Raises ValueError with a suggestion for an unknown name."""
    fields = Recipe.model_fields
    owner: dict[str, str] = {}
    for section in _SECTIONS:
        annotation = fields[section].annotation
        for name in annotation.model_fields:
            owner.setdefault(name, section)
    recipe: dict[str, Any] = {}
    for name, value in settings.items():
        if name in fields:
            merged = recipe.setdefault(name, {})
            recipe[name] = merged | dict(value) if isinstance(value, Mapping) else value
        elif name in owner:
            recipe.setdefault(owner[name], {})[name] = value
        else:
            near = SYNONYMS.get(name, "").rpartition(".")[2] or closest(name, [*owner, *fields])
            raise ValueError(f"unknown setting {name!r}" + (f"; did you mean {near!r}?" if near else ""))
    return recipe


def _rewards(reward: Any) -> tuple[list[dict[str, Any]], dict[str, Callable]]:
    """Recipe entries and functions by name."""
    if isinstance(reward, Mapping):
        named: Iterable[tuple[str | None, Any]] = reward.items()
    else:
        several = isinstance(reward, Sequence) and not isinstance(reward, str)
        named = [(None, r) for r in (reward if several else [reward])]
    entries, functions = [], {}
    for name, part in named:
        if isinstance(part, str):
            entries.append({"function": part})
            continue
        if not callable(part):
            raise ValueError(f"reward={part!r} is neither a function nor the name of a built-in rule")
        name = name or part.__name__
        if name in functions:
            raise ValueError(f"two reward functions are named {name!r}; pass a dict of name -> function")
        functions[name] = part
        entries.append({"function": name})
    return entries, functions


def _dataset(config: dict[str, Any], dataset: Any) -> list[Mapping[str, Any]] | None:
    """Put a path into the section, or return the rows that were handed over."""
    if isinstance(dataset, str | Path):
        config["path"] = str(dataset)
        return None
    if not isinstance(dataset, Iterable):
        raise ValueError(f"a dataset of {dataset!r}: give a path, a hub name, or rows (dicts by column name)")
    config["path"] = IN_MEMORY
    return list(dataset)
