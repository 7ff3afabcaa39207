"""The Python API: a trainer per method, over the same recipe schema and the same code path as the command line.

    from rlhf import GRPOTrainer

    trainer = GRPOTrainer("Qwen/Qwen3-0.6B", train_dataset=rows, reward=my_reward, group_size=8, lr=1e-6, steps=100)
    trainer.train()

Keyword settings are the recipe's fields by their own names (`lr`, `group_size`, `max_response_tokens`, ...); a whole
section can be given as a dict (`rollout={"top_p": 0.9}`).

A run writes to `output_dir`/`name`, by default runs/grpo (the method's name). The same call again goes on where it was
interrupted, or, if it was finished, returns its model. Other settings, rows, weights or reward functions are another run:
`train` refuses to mix them and says what differs. Give such a run another `name`, or `train(fresh=True)`.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.recipe.load import plan_from_dict
from rlhf.recipe.preflight import Given, look_up
from rlhf.recipe.problems import Key
from rlhf.recipe.schema import Recipe
from rlhf.recipe.suggest import SYNONYMS, closest

# Sections whose fields may be given as plain keywords; where two hold the same name, the first one gets it.
_SECTIONS = ("trainer", "algorithm", "rollout", "run", "model", "runtime", "tracking", "data", "evaluation")
IN_MEMORY = (
    "in-memory"  # an object's name in the recipe is this and a hash of it: another object is another recipe
)

Reward = str | Callable[..., list[float | None]]


class _Trainer:
    method: str
    sections: tuple[
        str, ...
    ] = ()  # of the method: their fields are plain keywords, before any other section's
    eval_kind = "sets"  # what eval_dataset is: prompts to answer ("sets"), preference pairs ("pairs"), or rows like those
    # of train_dataset ("held_out")

    def __init__(
        self,
        model: Any,
        *,
        train_dataset: Any,
        reward: Reward | Sequence[Reward] | Mapping[str, Reward] = (),
        eval_dataset: Any = None,
        eval_reward: Reward | Sequence[Reward] | Mapping[str, Reward] = (),
        tokenizer: Any = None,
        **settings: Any,
    ) -> None:
        """`model`: a folder or hub name, or a transformers model (then `tokenizer` too). `train_dataset`: a path or hub
        name, or rows (a list of dicts or a `datasets.Dataset`). `reward`: `fn(prompts, responses, **columns) ->
        list[float | None]`, the name of a built-in rule, or several of them. `eval_reward`: the same for evaluations alone,
        where they are to judge by something else. `name`: the run's folder in `output_dir`;
        default: the method's name.

        Raises RecipeError (all problems at once) for settings that do not fit and for files, columns and reward
        functions that are not there, before any model loads.
        """
        from rlhf.runtime.assemble import Objects

        recipe = _sections(settings, (*self.sections, *_SECTIONS))
        recipe["method"] = self.method
        recipe.setdefault("run", {}).setdefault("name", self.method)
        rewards, functions = _rewards(reward)
        if rewards:
            recipe["reward"] = rewards
        eval_rewards, more = _rewards(eval_reward)
        if eval_rewards:
            recipe.setdefault("evaluation", {})["reward"] = eval_rewards
            functions |= more
        train_rows = _dataset("train_dataset", recipe.setdefault("data", {}), train_dataset)
        eval_rows = {}
        if eval_dataset is not None:
            eval_set = {k: v for k, v in recipe["data"].items() if k != "path"}
            rows = _dataset("eval_dataset", eval_set, eval_dataset)
            recipe.setdefault("evaluation", {}).setdefault(self.eval_kind, {})["eval"] = eval_set
            eval_rows = {"eval": rows} if rows is not None else {}
        if isinstance(model, str | Path):
            recipe.setdefault("model", {})["path"] = str(model)
        else:
            _check_model(model, tokenizer)
            recipe.setdefault("model", {})["path"] = f"{IN_MEMORY}:{_weights_hash(model)}"
            recipe["model"].setdefault("dtype", str(model.dtype).removeprefix("torch."))
        rows: dict[Key, Sequence[Any]] = {("data",): train_rows} if train_rows is not None else {}
        rows |= {("evaluation", self.eval_kind, name): part for name, part in eval_rows.items()}
        given = Given(
            model=not isinstance(model, str | Path),
            tokenizer=tokenizer is not None,
            rows=rows,
            functions=functions,
        )
        self.plan = plan_from_dict(recipe, look_up=lambda checked: look_up(checked, given))
        for warning in self.plan.warnings:
            warnings.warn(f"{warning.key}: {warning.message}", stacklevel=2)
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

    def train(self, *, fresh: bool = False) -> Path:
        """Train to the end, or go on where an interrupted run of this name stopped. Returns the model's folder.

        With `fresh`, an earlier run of this name is moved aside (never deleted) and training starts again. Raises
        ValueError if the folder holds a run of other settings or objects, and what stopped the run; the run directory
        holds everything up to the last checkpoint.
        """
        from rlhf.runtime.run import train_plan

        return train_plan(self.plan, objects=self._objects, fresh=fresh)


class SFTTrainer(_Trainer):
    """Supervised fine-tuning on the answers in `response_column`, or on `messages_column`; see `rlhf.trainers.sft`.
    `eval_dataset`: rows of the same columns, for their loss; prompts to be answered and rewarded go into
    `evaluation={"sets": ...}`."""

    method, eval_kind = "sft", "held_out"


class RewardTrainer(_Trainer):
    """A reward model from `chosen_column` and `rejected_column`; see `rlhf.trainers.rm`."""

    method, sections, eval_kind = "rm", ("reward_modeling",), "pairs"


class PRMTrainer(_Trainer):
    """A process reward model from judged steps; see `rlhf.trainers.rm`."""

    method, eval_kind = "prm", "held_out"


class PPOTrainer(_Trainer):
    """Proximal policy optimisation with a critic (arXiv 1707.06347); see `rlhf.trainers.ppo`. The reward comes from
    `reward` functions, from `reward_model={"path": ...}`, or both."""

    method = "ppo"


class GRPOTrainer(_Trainer):
    """Group-relative policy optimisation (arXiv 2402.03300) and its family; see `rlhf.trainers.grpo`."""

    method = "grpo"


class DPOTrainer(_Trainer):
    """Direct preference optimisation (arXiv 2305.18290) and its family: `losses={"ipo": 1.0}`, `beta=0.1`, ...; see
    `rlhf.trainers.dpo`."""

    method, sections, eval_kind = "dpo", ("preference",), "pairs"


class OnlineDPOTrainer(_Trainer):
    """DPO on pairs of the policy's own responses; see `rlhf.trainers.online_dpo`."""

    method, sections = "online_dpo", ("preference", "online")


class KTOTrainer(_Trainer):
    """KTO (arXiv 2402.01306) on answers that are desirable or not; see `rlhf.trainers.kto`."""

    method, sections, eval_kind = "kto", ("kto",), "held_out"


class RejectionTrainer(_Trainer):
    """Fine-tuning on the best of n of the policy's own responses; see `rlhf.trainers.rejection`."""

    method, sections = "rejection", ("online",)


class DistillTrainer(_Trainer):
    """A student that imitates `teacher={"path": ...}`; see `rlhf.trainers.distill`."""

    method, sections = "distill", ("distill",)


def _sections(settings: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """{"lr": 1e-6} -> {"trainer": {"lr": 1e-6}}. Raises ValueError with a suggestion for an unknown name."""
    fields = Recipe.model_fields
    owner: dict[str, str] = {}
    for section in sections:
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
    entries, functions, names = [], {}, set()
    for name, part in named:
        if isinstance(part, str):
            entries.append({"function": part})
            continue
        if not callable(part):
            raise ValueError(f"reward={part!r} is neither a function nor the name of a built-in rule")
        name = name or part.__name__
        if name in names:
            raise ValueError(f"two reward functions are named {name!r}; pass a dict of name -> function")
        names.add(name)
        known_as = f"{IN_MEMORY}-{_function_hash(part)}:{name}"  # metrics are named by what follows the colon
        functions[known_as] = part
        entries.append({"function": known_as})
    return entries, functions


def _check_model(model: Any, tokenizer: Any) -> None:
    """Raise ValueError for objects that are no transformers model and its tokenizer."""
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    if not isinstance(getattr(model, "config", None), PretrainedConfig):
        way = "give a folder, a hub name, or a transformers model with its tokenizer"
        raise ValueError(f"model is of type {type(model).__name__}: {way}")
    if tokenizer is None:
        raise ValueError("a model object needs its tokenizer: pass tokenizer=")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer is of type {type(tokenizer).__name__}: give the model's transformers tokenizer"
        )


def _dataset(name: str, config: dict[str, Any], dataset: Any) -> list[Mapping[str, Any]] | None:
    """Put a path into the section, or return the rows that were handed over. `name` is the argument's, for errors."""
    if isinstance(dataset, str | Path):
        config["path"] = str(dataset)
        return None
    if not isinstance(dataset, Iterable):
        raise ValueError(f"{name}={dataset!r}: give a path, a hub name, or rows (dicts by column name)")
    if isinstance(dataset, Mapping):
        kind = f"{name} is a {type(dataset).__name__} of {', '.join(map(repr, dataset)) or 'nothing'}"
        if all(_holds_rows(part) for part in dataset.values()) and dataset:
            raise ValueError(f"{kind}: give one of its splits, such as {name}=...[{next(iter(dataset))!r}]")
        raise ValueError(f"{kind}: give rows, a list of dicts by column name, or a datasets.Dataset")
    rows = list(dataset)
    if rows and not any(isinstance(row, Mapping) for row in rows):
        kind = f"{name} is a {type(dataset).__name__} whose first entry is {rows[0]!r}"
        raise ValueError(f"{kind}: give rows, a list of dicts by column name, or a datasets.Dataset")
    config["path"] = f"{IN_MEMORY}:{_hash(json.dumps(rows, sort_keys=True, default=_plain))}"
    return rows


def _holds_rows(dataset: Any) -> bool:
    """Whether its first entry is a row."""
    return isinstance(dataset, Iterable) and isinstance(next(iter(dataset), None), Mapping)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=6).hexdigest()


def _plain(value: Any) -> Any:
    """A cell that JSON does not know, as the same in every process: an object's own text may hold its address."""
    if type(value).__module__ == "numpy":
        return value.tolist()
    known = isinstance(value, bytes | datetime.date | datetime.time | datetime.timedelta | decimal.Decimal)
    return str(value) if known else type(value).__name__


def _weights_hash(model: Any) -> str:
    from rlhf.recipe.schema import ModelConfig
    from rlhf.runtime.identity import model_identity

    return _hash(json.dumps(model_identity(ModelConfig(), seed=0, model=model), sort_keys=True))


def _function_hash(function: Callable) -> str:
    """Of its source text, or of its code where there is none; what it reads from outside itself is not seen."""
    if isinstance(function, functools.partial):
        return _hash(
            f"{_function_hash(function.func)} {function.args!r} {sorted(function.keywords.items())!r}"
        )
    try:
        return _hash(inspect.getsource(function))
    except (OSError, TypeError):  # typed into a console, or an object with __call__
        code = function.__code__ if inspect.isfunction(function) else type(function).__call__
        return _hash(
            f"{code.co_code!r} {code.co_names!r}" if inspect.iscode(code) else type(function).__qualname__
        )
