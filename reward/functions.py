"""The built-in reward rules, and finding a reward function by its name.

A reward function is called once for all responses of a step:

    fn(prompts: list[str], responses: list[str], **columns: list) -> list[float | None]

`columns` are the columns of the dataset rows, one entry per response; the recipe's `args` come as keyword
arguments too. A number is a reward; None means that the function could not judge this response, which masks
it.

Not here: calling the functions, deadlines, and what happens when one fails (`rlhf.reward.score`).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.recipe.suggest import closest
from rlhf.reward.gsm8k import final_number, is_correct

RewardFunction = Callable[..., Sequence[float | None]]


def gsm8k(
    prompts: list[str], responses: list[str], *, reference_column: str = "answer", **columns: list
) -> list[float]:
    """1 if the final number equals that of the reference column, else 0 (`rlhf.reward.gsm8k` has the rule).

    `reference_column` names the column with the reference solution or number. Raises ValueError if one holds
    no number.
    """
    answers = _column(columns, reference_column)
    return [float(is_correct(r, str(a))) for r, a in zip(responses, answers, strict=True)]


def exact_match(
    prompts: list[str], responses: list[str], *, reference_column: str = "answer", **columns: list
) -> list[float]:
    """1 if the response equals the reference column, blanks at both ends aside, else 0."""
    answers = _column(columns, reference_column)
    return [float(r.strip() == str(a).strip()) for r, a in zip(responses, answers, strict=True)]


def format_rule(
    prompts: list[str], responses: list[str], *, pattern: str = r"#### ?-?[0-9][0-9,.]*\s*$", **columns: list
) -> list[float]:
    r"""1 if the regular expression `pattern` is found in the response, else 0.

    By default a response must end in `#### <number>`. `.` matches a newline too. `^` and `$` are the ends of
    the whole response. The pattern is the recipe's and the text is the model's: avoid nested quantifiers such
    as `(a+)+`, whose time has no useful bound.
    """
    found = re.compile(pattern, re.DOTALL).search
    return [float(found(r) is not None) for r in responses]


FUNCTIONS: dict[str, RewardFunction] = {"gsm8k": gsm8k, "exact_match": exact_match, "format": format_rule}
# How a rule reads the answer out of a response, for votes among several; None = it holds none.
ANSWERS: dict[str, Callable[[str], Hashable | None]] = {"gsm8k": final_number, "exact_match": str.strip}


def resolve(name: str, extra: Mapping[str, RewardFunction] | None = None) -> RewardFunction:
    """The reward function called `name`: one of `extra`, a built-in rule, "package.module:function", or
    "file.py:function" (a path; relative to the working directory). Raises ValueError with what there is
    instead."""
    known = {**FUNCTIONS, **(extra or {})}
    if name in known:
        return known[name]
    where, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"reward function {name!r} is unknown{did_you_mean(name, known)}; "
            f"there are {', '.join(sorted(known))}, "
            'or write "package.module:function" or "file.py:function"'
        )
    module = _load_file(where) if where.endswith(".py") else _load_module(where)
    found = vars(module).get(attribute)
    if not callable(found):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise ValueError(
            f"reward function {name!r}: {where} has no function {attribute!r}"
            f"{did_you_mean(attribute, functions)}; it has {', '.join(sorted(functions)) or 'none'}"
        )
    return found


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A hint to append to a message; "" if no choice is near."""
    near = closest(name, list(choices))
    return f" (did you mean {near!r}?)" if near is not None else ""


def _load_file(path: str) -> Any:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"reward function file {path!r} does not exist (looked in {file.resolve().parent})")
    name = f"rlhf_reward_file_{file.stem}_{zlib.crc32(str(file.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look the module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"reward function file {path!r} does not load: {type(error).__name__}: {error}"
        ) from error
    return module


def _load_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"reward module {name!r} does not import: {type(error).__name__}: {error}"
        ) from error


def _column(columns: Mapping[str, list], name: str) -> list:
    if name not in columns:
        raise ValueError(
            f"the dataset has no column {name!r}{did_you_mean(name, columns)}; it has "
            f"{', '.join(sorted(columns)) or 'none'}; name the column with the reward's "
            "args: {reference_column: ...}"
        )
    for i, value in enumerate(columns[name]):
        if value is None:
            raise ValueError(
                f"column {name!r} is None at index {i}; a missing reference is not a wrong answer"
            )
    return columns[name]
