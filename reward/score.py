"""Scoring: call the reward functions of a recipe on rollouts and fill in `reward`, `reward_parts`,
`reward_error`.

A reward that failed is missing, never zero: the response is masked and counted, and when more than 5 % of a
step's rewards are missing the run stops. Not here: the rules themselves (`rlhf.reward.functions`) and
anything that is computed from rewards (`rlhf.advantages`).
"""

from __future__ import annotations

import inspect
import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from rlhf.data.datasets import did_you_mean
from rlhf.faults import fault_point
from rlhf.recipe.schema import RewardConfig
from rlhf.records import Rollout
from rlhf.reward.functions import FUNCTIONS, RewardFunction, resolve

MAX_MISSING_FRAC = 0.05  # above this share of missing rewards the run stops
MAX_MAGNITUDE = 1e6  # a larger reward is a bug of the function, and would drown a float32 sum

_log = logging.getLogger("rlhf.reward")


class RewardError(RuntimeError):
    """Scoring cannot go on: a reward function breaks its contract, or too many rewards are missing."""


class RewardTimeout(Exception):
    """A reward function did not return before its deadline."""


@dataclass(frozen=True)
class _Part:
    """One reward function of the recipe, and which columns it is given."""

    name: str  # as in the metric reward/<name>/mean
    function: RewardFunction
    config: RewardConfig
    builtin: bool
    takes: frozenset[str] | None  # columns it names; None = every column
    needs: frozenset[str]  # those without a default
    refuses: frozenset[str]  # names that are the rule's options, never columns


@dataclass(frozen=True)
class _Judgement:
    """What one part says of one response: a value, or why there is none."""

    value: float | None = None
    error: str | None = None
    timeout: bool = False


class Scorer:
    """Scores rollouts with the weighted sum of a recipe's reward functions.

    `functions` are further functions by name (the Python API's callables). Raises ValueError for a function
    that does not exist, a wrong file, or arguments that the function does not take.

    The built-in rules run in this thread: their time is bounded. Any other function runs in a daemon thread
    with `timeout_s` as its deadline; after it the run goes on without the thread, which Python cannot kill. A
    loop inside C code that keeps the interpreter's lock (`9**9**9`) also keeps the deadline from being
    noticed.
    """

    def __init__(
        self, configs: Sequence[RewardConfig], functions: Mapping[str, RewardFunction] | None = None
    ) -> None:
        if not configs:
            raise ValueError("no reward function is configured; name at least one under reward:")
        self._parts = _build_parts(configs, functions or {})
        self._reported: set[tuple[str, ...]] = set()
        self.stats: dict[str, float] = {}

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts, in the same order, with reward (the weighted sum of the parts) and reward_parts;
        where a part is missing, reward is None and reward_error says why. `stats` then holds this call's
        metrics.

        A call that raises is repeated one response at a time, to find the responses to blame. Raises
        RewardError for a result of the wrong length or type, and when more than 5 % of the rewards (and more
        than one) are missing.
        """
        if not rollouts:
            self.stats = {}
            return []
        judgements: dict[str, list[_Judgement]] = {}
        for part in self._parts:
            judgements[part.name] = self._judge(part, rollouts)
            fault_point("reward.mid")
        scored = [
            self._merge(r, [judgements[p.name][i] for p in self._parts]) for i, r in enumerate(rollouts)
        ]
        timeouts = [any(column[i].timeout for column in judgements.values()) for i in range(len(scored))]
        self.stats = _stats(scored, timeouts, [p.name for p in self._parts])
        _stop_if_too_many_missing(scored)
        return scored

    def _merge(self, rollout: Rollout, row: Sequence[_Judgement]) -> Rollout:
        parts = {p.name: j.value for p, j in zip(self._parts, row, strict=True) if j.value is not None}
        errors = [
            f"{p.name}: {j.error}" for p, j in zip(self._parts, row, strict=True) if j.error is not None
        ]
        total = None if errors else sum(p.config.weight * parts[p.name] for p in self._parts)
        return rollout.replace(reward=total, reward_parts=parts, reward_error="; ".join(errors) or None)

    def _judge(self, part: _Part, rollouts: Sequence[Rollout]) -> list[_Judgement]:
        deadline = time.monotonic() + part.config.timeout_s
        arguments = _arguments(part, rollouts)
        try:
            return _read_result(part, self._call(part, arguments, deadline), len(rollouts))
        except RewardTimeout as error:
            _log.error("reward function %s: %s", part.name, error)
            return [_Judgement(error=str(error), timeout=True)] * len(rollouts)
        except RewardError:
            raise
        except Exception as error:
            self._report(part, error)
            if len(rollouts) == 1:
                return [_Judgement(error=_one_line(error))]
        return [self._judge_alone(part, rollout, deadline) for rollout in rollouts]

    def _judge_alone(self, part: _Part, rollout: Rollout, deadline: float) -> _Judgement:
        """One response by itself, after the call for all of them has raised."""
        try:
            return _read_result(part, self._call(part, _arguments(part, [rollout]), deadline), 1)[0]
        except RewardTimeout as error:
            return _Judgement(error=str(error), timeout=True)
        except RewardError:
            raise
        except Exception as error:
            self._report(part, error)
            return _Judgement(error=_one_line(error))

    def _call(
        self, part: _Part, arguments: tuple[list[str], list[str], dict[str, Any]], deadline: float
    ) -> Any:
        prompts, responses, keywords = arguments
        if part.builtin:
            return part.function(prompts, responses, **keywords)
        return _call_with_deadline(part, lambda: part.function(prompts, responses, **keywords), deadline)

    def _report(self, part: _Part, error: Exception) -> None:
        """Log one traceback for each distinct error: same function, same type, same line."""
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        identity = (part.name, type(error).__name__, where)
        if identity not in self._reported:
            self._reported.add(identity)
            _log.error("reward function %s failed; the response is masked", part.name, exc_info=error)


def _build_parts(configs: Sequence[RewardConfig], extra: Mapping[str, RewardFunction]) -> list[_Part]:
    parts: list[_Part] = []
    for config in configs:
        name = _part_name(config.function, [p.name for p in parts])
        parts.append(_build_part(name, resolve(config.function, extra), config))
    return parts


def _part_name(function: str, taken: Sequence[str]) -> str:
    """The function's own name; a second one of that name gets a number."""
    base = function.rpartition(":")[2]
    name, number = base, 2
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name


def _build_part(name: str, function: RewardFunction, config: RewardConfig) -> _Part:
    """Read the function's signature.

    Raises ValueError for args that it would not take, or that a built-in rule's **columns would swallow.
    """
    builtin = function in FUNCTIONS.values()
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # written in C without a signature: it gets every column, and its own error will tell
        return _Part(name, function, config, builtin, None, frozenset(), frozenset())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ValueError(f"reward function {config.function!r} must take (prompts, responses, **columns)")
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {
        p.name: p
        for p in parameters
        if p not in positional[:2] and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    for key in config.args:
        if key in {p.name for p in positional[:2]} or (key not in named and (builtin or not open_ended)):
            raise ValueError(
                f"reward function {config.function!r} takes no argument {key!r}{did_you_mean(key, named)}; "
                f"it takes {', '.join(named) or 'none'}"
            )
    return _Part(
        name=name,
        function=function,
        config=config,
        builtin=builtin,
        takes=None if open_ended else frozenset(named),
        needs=frozenset(n for n, p in named.items() if p.default is p.empty) - config.args.keys(),
        refuses=frozenset(p.name for p in positional[:2]) | (frozenset(named) if builtin else frozenset()),
    )


def _arguments(part: _Part, rollouts: Sequence[Rollout]) -> tuple[list[str], list[str], dict[str, Any]]:
    """(prompts, responses, keyword arguments) of one call; args of the recipe win over columns of their name.

    Raises RewardError if a column that the function needs is in no row.
    """
    names = {name for rollout in rollouts for name in rollout.prompt.row}
    for column in sorted(part.needs - names):
        raise RewardError(
            f"reward function {part.name} needs the column {column!r}{did_you_mean(column, names)}; "
            f"the dataset has {', '.join(sorted(names)) or 'none'}"
        )
    names = (names if part.takes is None else names & part.takes) - part.refuses
    columns = {name: [r.prompt.row.get(name) for r in rollouts] for name in sorted(names)}
    prompts = [r.prompt.text for r in rollouts]
    return prompts, [r.response_text for r in rollouts], {**columns, **part.config.args}


def _call_with_deadline(part: _Part, call: Callable[[], Any], deadline: float) -> Any:
    """Run `call` in a thread that does not keep the process from ending, and wait until the deadline.

    Raises what the call raised, or RewardTimeout; after the deadline the call is not even started.
    """
    late = RewardTimeout(
        f"no result after timeout_s={part.config.timeout_s:g}; "
        "make the function faster or raise reward.timeout_s"
    )
    if time.monotonic() >= deadline:
        raise late
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((True, call()))
        except BaseException as error:  # handed to the caller's thread, SystemExit included
            outcome.put((False, error))

    threading.Thread(target=run, name=f"reward-{part.name}", daemon=True).start()
    try:
        returned, value = outcome.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise late from None
    if returned:
        return value
    if isinstance(value, Exception):
        raise value
    raise RewardError(f"reward function {part.name}: raised {type(value).__name__}: {value}") from value


def _read_result(part: _Part, result: Any, n: int) -> list[_Judgement]:
    """The returned list as judgements. Raises RewardError where the function breaks its contract."""
    if isinstance(result, (np.ndarray, torch.Tensor)):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise RewardError(
            f"reward function {part.name}: returned {type(result).__name__}, "
            f"must return a list of {n} numbers"
        )
    if len(result) != n:
        raise RewardError(f"reward function {part.name}: returned {len(result)} rewards for {n} responses")
    return [_read_value(part, i, value) for i, value in enumerate(result)]


def _read_value(part: _Part, index: int, value: Any) -> _Judgement:
    if value is None:
        return _Judgement(error=f"returned None at index {index}")
    if isinstance(value, np.bool_) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    if not isinstance(value, Real):
        raise RewardError(
            f"reward function {part.name}: index {index} is {value!r} ({type(value).__name__}), "
            "must be a number or None (= could not judge)"
        )
    number = float(value)
    if not math.isfinite(number):
        return _Judgement(error=f"returned {number} at index {index}")
    if abs(number) > MAX_MAGNITUDE:
        return _Judgement(error=f"returned {number:g} at index {index}, beyond {MAX_MAGNITUDE:g}")
    return _Judgement(value=number)


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:200] + "..."


def _stats(rollouts: Sequence[Rollout], timeouts: Sequence[bool], parts: Sequence[str]) -> dict[str, float]:
    """Metrics over the responses whose reward is there; NaN where there is none. std divides by n."""
    rewards = np.array([r.reward for r in rollouts if r.reward is not None], dtype=np.float64)
    stats = dict.fromkeys(("reward/mean", "reward/std", "reward/min", "reward/max"), math.nan)
    if len(rewards):
        stats = {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/min": float(rewards.min()),
            "reward/max": float(rewards.max()),
        }
    for name in parts:
        values = [r.reward_parts[name] for r in rollouts if name in r.reward_parts]
        stats[f"reward/{name}/mean"] = float(np.mean(values)) if values else math.nan
    missing = sum(r.reward is None for r in rollouts)
    stats["reward/error_frac"] = (missing - sum(timeouts)) / len(rollouts)
    stats["reward/timeout_frac"] = sum(timeouts) / len(rollouts)
    return stats


def _stop_if_too_many_missing(rollouts: Sequence[Rollout]) -> None:
    """One missing reward alone never stops a run, unless it is the only one."""
    errors = [(r.sample_id, r.reward_error) for r in rollouts if r.reward is None]
    share = len(errors) / len(rollouts)
    if share > MAX_MISSING_FRAC and (len(errors) > 1 or len(errors) == len(rollouts)):
        distinct = list(dict.fromkeys(error for _, error in errors))
        shown = "; ".join(distinct[:3])
        raise RewardError(
            f"{len(errors)} of {len(rollouts)} rewards are missing "
            f"({share:.0%}, the limit is {MAX_MISSING_FRAC:.0%}), "
            f"the first for sample {errors[0][0]}: {shown}"
        )
