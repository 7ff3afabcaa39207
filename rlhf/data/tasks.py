"""The built-in tasks: rows made on the spot, a pure function of the task's arguments. No files, no network.

Not here: turning rows into prompts (`rlhf.data.prompts`) and judging answers (the gsm8k rule in
`rlhf.reward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from rlhf import rng
from rlhf.recipe.schema import Fraction, NonNegative, Positive, Section

_MAX_MISSES = 2000  # draws in a row without a new chain, after which there are taken to be no more
_WRONG_BY = (-3, -2, -1, 1, 2, 3)


class ChainArithmetic(Section):
    """Chains of one-digit additions and subtractions, worked from left to right.

    A row: prompt `7+5-3+9=`, response `7+5=12 12-3=9 9+9=18####18`, answer `18`. The response ends in the
    marker that the gsm8k rule reads; every character is in the default alphabet of a `characters` tokenizer.
    Operands are 1 to max_digit and no intermediate result is negative.

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

    def rows(self) -> list[dict[str, str]]:
        """The rows: {id, prompt, answer, response}. Raises ValueError if there are fewer than `count`
        chains."""
        if self.lazy_frac and self.split == "eval":
            raise ValueError(
                f"lazy_frac={self.lazy_frac:g} is for split=train; held-out rows have worked answers only"
            )
        return [self._row(i, chain) for i, chain in enumerate(self._chains())]

    def _chains(self) -> list[str]:
        chains: dict[str, None] = {}
        misses = draw = 0
        while len(chains) < self.count:
            chain = self._draw(draw)
            draw += 1
            if chain is None or chain in chains or _split_of(chain) != self.split:
                misses += 1
                if misses == _MAX_MISSES:
                    raise ValueError(
                        f"count={self.count}, but only {len(chains)} different chains of terms={self.terms}, max_digit={self.max_digit}, "
                        f"ops={self.ops!r} were found for split={self.split}; lower count or raise terms"
                    )
                continue
            chains[chain] = None
            misses = 0
        return list(chains)

    def _draw(self, draw: int) -> str | None:
        """One chain; None where a result would be negative."""
        chain, total = "", 0
        for term in range(self.terms):
            bits = rng.key(self.seed, "chain_arithmetic", self.terms, self.ops, draw, term)
            digit, op = 1 + bits % self.max_digit, self.ops[bits // self.max_digit % len(self.ops)]
            if term == 0:
                chain, total = str(digit), digit
                continue
            total += digit if op == "+" else -digit
            if total < 0:
                return None
            chain += f"{op}{digit}"
        return chain

    def _row(self, index: int, chain: str) -> dict[str, str]:
        steps, answer = _work(chain)
        if _unit(self.seed, "chain_arithmetic lazy", index) < self.lazy_frac:
            response = f"####{_guess(answer, self.seed, index)}"
        else:
            response = f"{steps}####{answer}"
        return {
            "id": f"{self.split}/{index}",
            "prompt": f"{chain}=",
            "answer": str(answer),
            "response": response,
        }


def _work(chain: str) -> tuple[str, int]:
    """("7+5=12 12-3=9", 9) for "7+5-3"."""
    total, steps = int(chain[0]), []
    for op, digit in zip(chain[1::2], chain[2::2], strict=True):
        result = total + int(digit) if op == "+" else total - int(digit)
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


def chain_arithmetic(**args: Any) -> list[dict[str, str]]:
    """Rows of `ChainArithmetic`. Raises ValueError naming every argument that is unknown or out of range."""
    try:
        return ChainArithmetic(**args).rows()
    except ValidationError as error:
        raise ValueError("task chain_arithmetic: " + "; ".join(_problems(error, ChainArithmetic))) from None


def _problems(error: ValidationError, model: type[Section]) -> Iterator[str]:
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{name} is not an argument; there are {', '.join(model.model_fields)}"
        elif problem["type"] == "missing":
            yield f"{name} must be given"
        else:
            yield f"{name}={problem['input']!r}: {problem['msg']}"


TASKS: Mapping[str, Callable[..., list[dict[str, str]]]] = {"chain_arithmetic": chain_arithmetic}
