"""The built-in tasks: rows made on the spot, a pure function of the task's arguments. No files, no network.

Not here: turning rows into prompts (`rlhf.data.prompts`) and judging answers (the gsm8k rule in
`rlhf.reward`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from rlhf import rng
from rlhf.recipe.check import rule
from rlhf.recipe.problems import Fault
from rlhf.recipe.schema import Fraction, NonNegative, Positive, Section
from rlhf.recipe.suggest import closest, did_you_mean

_MAX_MISSES = 2000  # draws in a row without a new chain, after which there are taken to be no more
_WRONG_BY = (-3, -2, -1, 1, 2, 3)


class ChainArithmetic(Section):
    """Chains of one-digit additions and subtractions, worked from left to right.

    A row: prompt `7+5-3+9=`, response `7+5=12 12-3=9 9+9=18####18`, answer `18`. The response ends in the
    marker that the gsm8k rule reads; every character is in the default alphabet of a `characters` tokenizer.
    Operands are 1 to max_digit and no intermediate result is negative.

    Every row can also serve as a preference, a judged answer or judged steps. `chosen` is the worked answer, and
    `rejected` is by turns a wrong guess and an answer with a slip in one of its steps, which the later ones carry on
    (`7+5=13 13-3=10 10+9=19####19`). `judged` is one of the two, and `label` (true, false) and `verdict`
    (`+`, `-`) say whether it is right. `completions` are the steps of the worked answer or of the one with the slip, to be separated by a space, and `labels` whether the
    working is right so far.

    The splits are disjoint: a hash of the chain alone, the same under every seed, puts a tenth of all chains
    into `eval`. No chain comes twice in one set. A longer set begins with the shorter one of the same
    arguments.

    lazy_frac: this share of the training responses skips the working and ends in a wrong guess near the
    answer (`####16` above). A model warmed up on the mix answers in two manners, of which only the worked one
    is rewarded: sampled accuracy starts near 1 - lazy_frac, and reinforcement learning can raise it by
    preferring one manner. Watch it on samples at temperature 1: a greedy answer is wholly in the manner that
    is more frequent.
    """

    count: Positive
    """Rows."""
    split: Literal["train", "eval"] = "train"
    """The set; the two share no chain."""
    terms: Annotated[int, Field(ge=2, le=64)] = 4
    """Operands in a chain."""
    max_digit: Annotated[int, Field(ge=2, le=9)] = 9
    """Largest operand: with smaller ones there are fewer sums to learn."""
    ops: Literal["+-", "+", "-"] = "+-"
    """Operators that may occur."""
    seed: NonNegative = 0
    """Which chains are drawn."""
    lazy_frac: Fraction = 0.0
    """Share of training responses that skip the working and guess wrong."""

    @model_validator(mode="after")
    def _consistent(self) -> ChainArithmetic:
        if self.lazy_frac and self.split == "eval":
            raise ValueError(
                f"lazy_frac={self.lazy_frac:g} is for split: train; held-out rows have worked answers only"
            )
        most = self.max_digit**self.terms * len(self.ops) ** (self.terms - 1)
        if self.count > most:
            raise ValueError(
                f"count={self.count}, but terms={self.terms}, max_digit={self.max_digit}, ops={self.ops!r} make {most} "
                "chains at most; lower count or raise terms"
            )
        return self

    def rows(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The rows, or the first `limit` of them: {id, prompt, answer, response, chosen, rejected, judged, label, verdict,
        completions, labels}. Raises ValueError if there are fewer than `count` chains, whatever the limit."""
        chains = _chains(self.count, self.split, self.terms, self.max_digit, self.ops, self.seed)
        if len(chains) < self.count:
            raise ValueError(
                f"count={self.count}, but only {len(chains)} different chains of terms={self.terms}, "
                f"max_digit={self.max_digit}, ops={self.ops!r} were found for split={self.split}; lower count or raise terms"
            )
        return [self._row(i, chain) for i, chain in enumerate(chains[:limit])]

    def _row(self, index: int, chain: str) -> dict[str, Any]:
        steps, answer = _work(chain)
        worked = f"{steps}####{answer}"
        slip = rng.key(self.seed, "chain_arithmetic slip", index)
        at, by = slip % (self.terms - 1), _WRONG_BY[slip // self.terms % len(_WRONG_BY)]
        wrong_steps, wrong_answer = _work(chain, at, by)
        lazy = f"####{_guess(answer, self.seed, index)}"
        wrong = lazy if slip // 64 % 2 else f"{wrong_steps}####{wrong_answer}"
        right = _unit(self.seed, "chain_arithmetic judged", index) < 0.5
        if _unit(self.seed, "chain_arithmetic lazy", index) < self.lazy_frac:
            response = lazy
        else:
            response = worked
        completions = (steps if right else wrong_steps).split(" ")
        return {
            "id": f"{self.split}/{index}",
            "prompt": f"{chain}=",
            "answer": str(answer),
            "response": response,
            "chosen": worked,
            "rejected": wrong,
            "judged": worked if right else wrong,
            "label": right,
            "verdict": "+" if right else "-",
            "completions": completions,
            "labels": [right or step < at for step in range(len(completions))],
        }


class Coverage(Section):
    """One-digit answers of which the preferences cover a part: the synthetic case of arXiv 2404.10719, section 4.

    A row: prompt `3=`, response `6`, chosen `3`, rejected `6`, answer `3`, covered `36`. There are `size` prompts and as
    many answers; the best answer to a prompt is its own digit. For every prompt `covered` answers, the best among them,
    occur in preferences: `chosen` is the best and `rejected` one of the others. Nothing is said about the rest.

    `response` is drawn from all answers: its distribution is the reference, which a model learns by imitation. It
    spreads 1 - uncovered_frac evenly over the covered answers and uncovered_frac evenly over the rest.
    """

    count: Positive
    """Rows; the prompts take turns."""
    size: Annotated[int, Field(ge=3, le=10)] = 8
    """Prompts, and answers to each."""
    covered: Annotated[int, Field(ge=2, le=10)] = 3
    """Answers to a prompt that occur in preferences."""
    uncovered_frac: Fraction = 0.1
    """Share of the responses that no preference covers."""
    seed: NonNegative = 0
    """Which answers are covered, and which rows are drawn."""

    @model_validator(mode="after")
    def _consistent(self) -> Coverage:
        if self.covered >= self.size:
            raise ValueError(
                f"covered={self.covered} of size={self.size} answers leaves none that no preference covers; "
                "lower covered or raise size"
            )
        return self

    def rows(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The rows, or the first `limit` of them: {id, prompt, response, chosen, rejected, answer, covered}."""
        return [self._row(index, index % self.size) for index in range(self.count)[:limit]]

    def _row(self, index: int, best: int) -> dict[str, Any]:
        others = sorted((d for d in range(self.size) if d != best), key=lambda d: self._key("order", best, d))
        covered, rest = [best, *others[: self.covered - 1]], others[self.covered - 1 :]
        strays = _unit(self.seed, "coverage stray", index) < self.uncovered_frac
        source = rest if strays else covered
        rejected = str(covered[1 + self._key("other", index) % (self.covered - 1)])
        return {
            "id": str(index),
            "prompt": f"{best}=",
            "response": str(source[self._key("response", index) % len(source)]),
            "chosen": str(best),
            "rejected": rejected,
            "answer": str(best),
            "covered": "".join(map(str, covered)),
        }

    def _key(self, purpose: str, *parts: int) -> int:
        return rng.key(self.seed, f"coverage {purpose}", *parts)


@lru_cache(maxsize=64)  # a recipe's check and its stages ask for the same ones
def _chains(count: int, split: str, terms: int, max_digit: int, ops: str, seed: int) -> tuple[str, ...]:
    """`count` different chains, or as many as are found."""
    chains: dict[str, None] = {}
    misses = draw = 0
    while len(chains) < count and misses < _MAX_MISSES:
        chain = _draw(draw, terms, max_digit, ops, seed)
        draw += 1
        if chain is None or chain in chains or _split_of(chain) != split:
            misses += 1
            continue
        chains[chain] = None
        misses = 0
    return tuple(chains)


def _draw(draw: int, terms: int, max_digit: int, ops: str, seed: int) -> str | None:
    """One chain; None where a result would be negative."""
    chain, total = "", 0
    for term in range(terms):
        bits = rng.key(seed, "chain_arithmetic", terms, ops, draw, term)
        digit, op = 1 + bits % max_digit, ops[bits // max_digit % len(ops)]
        if term == 0:
            chain, total = str(digit), digit
            continue
        total += digit if op == "+" else -digit
        if total < 0:
            return None
        chain += f"{op}{digit}"
    return chain


def _work(chain: str, slip_at: int | None = None, slip_by: int = 0) -> tuple[str, int]:
    """("7+5=12 12-3=9", 9) for "7+5-3"; with a slip, the result of step `slip_at` is off by `slip_by`, or by as much
    the other way where it would be negative."""
    total, steps = int(chain[0]), []
    for step, (op, digit) in enumerate(zip(chain[1::2], chain[2::2], strict=True)):
        result = total + int(digit) if op == "+" else total - int(digit)
        if step == slip_at:
            result = result + slip_by if result + slip_by >= 0 else result - slip_by
        steps.append(f"{total}{op}{digit}={result}")
        total = result
    return " ".join(steps), total


def _guess(answer: int, seed: int, index: int) -> int:
    """A wrong answer, at most 3 away and not negative."""
    choices = [answer + d for d in _WRONG_BY if answer + d >= 0]
    return choices[rng.key(seed, "chain_arithmetic guess", index) % len(choices)]


def _split_of(chain: str) -> str:
    return "eval" if rng.key(0, "chain_arithmetic split", chain) % 10 == 0 else "train"


def _unit(seed: int, purpose: str, index: int) -> float:
    """A number in [0, 1) for this purpose and row."""
    return rng.key(seed, purpose, index) / 2**63


def make_rows(task: str, **args: Any) -> list[dict[str, Any]]:
    """The rows of a task. Raises ValueError naming every argument that is unknown or out of range, and a count of more
    rows than there are."""
    return first_rows(task, args, None)


def first_rows(task: str, args: Mapping[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` of the rows that `make_rows` gives (None: all). Raises what it raises."""
    faults = argument_faults(task, args)
    if faults:
        raise ValueError(f"task {task}: " + "; ".join(map(str, faults)))
    return ARGUMENTS[task](**args).rows(limit)


def argument_faults(task: str, args: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with a task's arguments; keys are the arguments' names, where several disagree that of the one with
    which the message begins."""
    arguments = ARGUMENTS[task]
    try:
        arguments(**args)
    except ValidationError as error:
        return [_fault(task, problem, list(arguments.model_fields)) for problem in error.errors()]
    return []


def _fault(task: str, problem: Mapping[str, Any], known: list[str]) -> Fault:
    key = tuple(problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = closest(str(key[0]), known)
        return Fault(
            (key,), f"task {task} has no such argument", did_you_mean(near, f"it has {', '.join(known)}")
        )
    if problem["type"] == "missing":
        return Fault((key,), f"task {task} needs it")
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        first = message.partition("=")[0]
        return Fault(((*key, first) if first in known else key,), message)
    choices = (
        re.findall(r"'([^']*)'", problem["ctx"]["expected"]) if problem["type"] == "literal_error" else []
    )
    near = closest(str(problem["input"]), choices)
    return Fault((key,), f"{problem['input']!r} is not {rule(problem)}", did_you_mean(near, ""))


ARGUMENTS: Mapping[str, type[ChainArithmetic | Coverage]] = {
    "chain_arithmetic": ChainArithmetic,
    "coverage": Coverage,
}
TASKS: Mapping[str, Callable[..., list[dict[str, Any]]]] = {
    task: partial(make_rows, task) for task in ARGUMENTS
}
