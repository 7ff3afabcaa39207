"""Scoring: call the reward functions of a recipe on rollouts and fill in `reward`, `reward_parts`,
`reward_error`.

A reward that failed is missing, never zero: the response is masked and counted, and when more than 5 % of a
step's rewards are missing, and more than one, the run stops. Not here: the rules themselves (`rlhf.reward.functions`) and
anything that is computed from rewards (`rlhf.advantages`).
"""

from __future__ import annotations

import faulthandler
import functools
import inspect
import logging
import math
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.faults import fault_point
from rlhf.recipe.schema import RewardConfig
from rlhf.records import Rollout
from rlhf.reward.child import describe
from rlhf.reward.functions import ANSWERS, FUNCTIONS, RewardFunction, did_you_mean, resolve
from rlhf.reward.process import FunctionFailed, NotSendable, RewardProcess, RewardTimeout
from rlhf.reward.results import Judgement, RewardError, read_result

MAX_MISSING_FRAC = 0.05  # above this share of missing rewards, and more than one, the run stops
_UNBOUNDED = frozenset({"format"})  # rules whose time has no bound: their pattern is the recipe's
_GRACE_S = 15.0  # after the deadline, for this process to notice it before it is ended from outside Python

_FAILED = "failed; the response is masked\n"

_log = logging.getLogger("rlhf.reward")


@dataclass(frozen=True)
class _Part:
    """One reward function of the recipe, and which columns it is given."""

    name: str  # as in the metric reward/<name>/mean
    function: RewardFunction
    config: RewardConfig
    builtin: bool
    runs: str  # "here": in this thread; "thread": in this process, under a deadline; "process": see RewardProcess
    takes: frozenset[str] | None  # columns it names; None = every column
    needs: frozenset[str]  # those without a default
    refuses: frozenset[str]  # names that are the rule's options, never columns


class Scorer:
    """Scores rollouts with the weighted sum of a recipe's reward functions.

    `functions` are further functions by name (the Python API's callables). Raises ValueError for a function
    that does not exist, a wrong file, or arguments that the function does not take.

    A function that the recipe names runs in a process of its own, which is killed at its deadline, `timeout_s`
    after the call, with everything that it has started; what it prints is appended to the file `output`. Built-in rules whose time is bounded run in this thread. Functions that were handed over as
    objects keep their state, closures and notebooks included: they run in a thread of this process, which Python
    cannot kill. At the deadline its stack is logged, the call counts as failed and the thread is left alone; if
    it does not let go of the interpreter's lock either (`9**9**9`), all stacks are printed and the process ends.
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        functions: Mapping[str, RewardFunction] | None = None,
        *,
        output: Path | None = None,
    ) -> None:
        if not configs:
            raise ValueError("no reward function is configured; name at least one under reward:")
        self._parts = _build_parts(configs, functions or {})
        apart = {p.name: p.config.function for p in self._parts if p.runs == "process"}
        self._process = RewardProcess(apart, output=output) if apart else None
        self._said: set[tuple[str, str]] = set()
        self.stats: dict[str, float] = {}
        # Reads the answer out of a response's text, by the first rule that knows how; None = no rule does.
        self.answer_of = next((ANSWERS[c.function] for c in configs if c.function in ANSWERS), None)

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts, in the same order, with reward (the weighted sum of the parts) and reward_parts;
        where a part is missing, reward is None and reward_error says why. `stats` then holds this call's
        metrics.

        A call that raises, or is killed at its deadline, is repeated one response at a time, to find the responses to
        blame; that takes `timeout_s` at most once more. Raises RewardError for a result of the wrong length or type,
        and when more than 5 % of the rewards, and more than one, are missing.
        """
        if not rollouts:
            self.stats = {}
            return []
        judgements: dict[str, list[Judgement]] = {}
        for part in self._parts:
            judgements[part.name] = self._judge(part, rollouts)
            fault_point("reward.mid")
        scored = [
            self._merge(r, [judgements[p.name][i] for p in self._parts]) for i, r in enumerate(rollouts)
        ]
        timeouts = [any(column[i].timeout for column in judgements.values()) for i in range(len(scored))]
        self.stats = _stats(scored, timeouts, [p.name for p in self._parts])
        stop_if_too_many_missing(scored)
        return scored

    def _merge(self, rollout: Rollout, row: Sequence[Judgement]) -> Rollout:
        parts = {p.name: j.value for p, j in zip(self._parts, row, strict=True) if j.value is not None}
        errors = [
            f"{p.name}: {j.error}" for p, j in zip(self._parts, row, strict=True) if j.error is not None
        ]
        total = None if errors else sum(p.config.weight * parts[p.name] for p in self._parts)
        return rollout.replace(reward=total, reward_parts=parts, reward_error="; ".join(errors) or None)

    def _judge(self, part: _Part, rollouts: Sequence[Rollout]) -> list[Judgement]:
        if part.runs == "process" and part.name in (failures := self._process.failures()):
            self._say_once(
                part,
                "import",
                f"runs in this process, it could not be imported in another: {failures[part.name]}",
            )
            part = replace(part, runs="thread")
        deadline = time.monotonic() + part.config.timeout_s
        try:
            return self._call(part, rollouts, deadline)
        except RewardTimeout:
            late = _late(part)
            _log.error("reward function %s: %s", part.name, late.error)
            if part.runs != "process" or len(rollouts) == 1:  # a thread is still running the first call
                return [late] * len(rollouts)
        except FunctionFailed as error:
            self._say_once(part, error.where, _FAILED + error.text)
            if len(rollouts) == 1:
                return [Judgement(error=error.line)]
        if part.runs == "process":
            return self._judge_in_shares(part, rollouts)
        return [self._judge_alone(part, rollout, deadline)[0] for rollout in rollouts]

    def _judge_in_shares(self, part: _Part, rollouts: Sequence[Rollout]) -> list[Judgement]:
        """Each response by itself in the functions' process, in `timeout_s` for all of them together and a share of it
        for each: more than 20 times the mean, so that as many may hang as may be missing. Starting a new process after
        one was ended does not count; one response more than may be missing is the last that is tried."""
        judgements: list[Judgement] = []
        most = max(1, math.floor(MAX_MISSING_FRAC * len(rollouts)))
        left_s, share_s = part.config.timeout_s, part.config.timeout_s / (most + 2)
        ends = 0  # responses that were late or ended the process
        for rollout in rollouts:
            if ends > most:
                text = f"not tried: {ends} others of this step were late or ended the functions' process"
                judgements.append(Judgement(error=text))
                continue
            self._process.failures()  # it is up
            begun = time.monotonic()
            judgement, ended = self._judge_alone(part, rollout, begun + min(share_s, left_s), share_s)
            left_s -= min(time.monotonic() - begun, share_s)  # ending the process does not count either
            judgements.append(judgement)
            ends += ended
        return judgements

    def _judge_alone(
        self, part: _Part, rollout: Rollout, deadline: float, share_s: float | None = None
    ) -> tuple[Judgement, bool]:
        """One response, after the call for all has failed or was late; and whether it was late or ended a process."""
        try:
            return self._call(part, [rollout], deadline)[0], False
        except RewardTimeout:
            return _late(part, share_s), True
        except FunctionFailed as error:
            self._say_once(part, error.where, _FAILED + error.text)
            return Judgement(error=error.line), not error.raised

    def _call(self, part: _Part, rollouts: Sequence[Rollout], deadline: float) -> list[Judgement]:
        """Raises RewardTimeout, FunctionFailed, and RewardError for a broken contract."""
        prompts, responses, keywords = _arguments(part, rollouts)
        if part.runs == "process":
            try:
                return self._process.call(part.name, prompts, responses, keywords, deadline)
            except NotSendable as error:
                self._say_once(
                    part, "arguments", f"runs in this process, its arguments cannot be sent: {error}"
                )
        call = functools.partial(part.function, prompts, responses, **keywords)
        if part.runs == "here":
            try:
                result = call()
            except Exception as error:
                raise FunctionFailed(**describe(error)) from error
        else:
            result = _call_with_deadline(part, call, deadline)
        return read_result(part.name, result, len(rollouts))

    def _say_once(self, part: _Part, where: str, text: str) -> None:
        """One message for each part and place: a traceback for each distinct error."""
        if (part.name, where) not in self._said:
            self._said.add((part.name, where))
            _log.error("reward function %s %s", part.name, text)


def _build_parts(configs: Sequence[RewardConfig], extra: Mapping[str, RewardFunction]) -> list[_Part]:
    parts: list[_Part] = []
    for config in configs:
        name = _part_name(config.function, [p.name for p in parts])
        if config.function in extra:
            runs = "thread"
        elif config.function in FUNCTIONS and config.function not in _UNBOUNDED:
            runs = "here"
        else:
            runs = "process"
        parts.append(_build_part(name, resolve(config.function, extra), config, runs))
    return parts


def _part_name(function: str, taken: Sequence[str]) -> str:
    """The function's own name; a second one of that name gets a number."""
    base = function.rpartition(":")[2]
    name, number = base, 2
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name


def _build_part(name: str, function: RewardFunction, config: RewardConfig, runs: str) -> _Part:
    """Read the function's signature.

    Raises ValueError for args that it would not take, or that a built-in rule's **columns would swallow.
    """
    builtin = function in FUNCTIONS.values()
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # written in C without a signature: it gets every column, and its own error will tell
        return _Part(name, function, config, builtin, runs, None, frozenset(), frozenset())
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
        runs=runs,
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


def _late(part: _Part, share_s: float | None = None) -> Judgement:
    limit = f"timeout_s={part.config.timeout_s:g}"
    if share_s is not None:
        limit = f"{share_s:.3g} s, its share of {limit}"
    text = f"no result after {limit}; make the function faster or raise reward.timeout_s"
    return Judgement(error=text, timeout=True)


def _call_with_deadline(part: _Part, call: Callable[[], Any], deadline: float) -> Any:
    """Run `call` in a thread that does not keep the process from ending, and wait until the deadline.

    Raises FunctionFailed or RewardTimeout; after the deadline the call is not even started.
    """
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise RewardTimeout
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((True, call()))
        except BaseException as error:  # handed to the caller's thread, SystemExit included
            outcome.put((False, error))

    thread = threading.Thread(target=run, name=f"reward-{part.name}", daemon=True)
    # It needs no interpreter's lock, which the function may never give back.
    faulthandler.dump_traceback_later(left_s + _GRACE_S, exit=True)
    try:
        thread.start()
        returned, value = outcome.get(timeout=left_s)
    except queue.Empty:
        frame = sys._current_frames().get(thread.ident)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        _log.error("reward function %s is still running, and is left running, in\n%s", part.name, stack)
        raise RewardTimeout from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    if returned:
        return value
    if isinstance(value, Exception):
        raise FunctionFailed(**describe(value)) from value
    raise RewardError(f"reward function {part.name}: raised {type(value).__name__}: {value}") from value


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


def stop_if_too_many_missing(rollouts: Sequence[Rollout]) -> None:
    """Above 5 % the run stops. One missing reward alone never stops it, unless it is the only one of the step."""
    errors = [(r.sample_id, r.reward_error) for r in rollouts if r.reward is None]
    share = len(errors) / len(rollouts)
    if share > MAX_MISSING_FRAC and (len(errors) > 1 or len(errors) == len(rollouts)):
        distinct = list(dict.fromkeys(error for _, error in errors))
        shown = "; ".join(distinct[:3])
        raise RewardError(
            f"{len(errors)} of {len(rollouts)} rewards are missing ({share:.1%}); a run stops if more than one and more than "
            f"{MAX_MISSING_FRAC:.0%} of a step are, or all; the first for sample {errors[0][0]}: {shown}"
        )
