"""What a refused recipe says: one Problem per mistake, all of them in one RecipeError.

Here: the report. Not here: how a mistake is found (`tree`, `check`, `load`, `preflight`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.recipe.schema import Recipe

Key = tuple[str | int, ...]  # a key's path from the recipe's top


@dataclass(frozen=True)
class Fault:
    """A mistake in a recipe's values, not yet traced to the line on which they were written."""

    keys: tuple[Key, ...]  # every value it rests on; the first is the one to change
    message: str  # names the value and the rule it broke
    hint: str = ""  # the way out

    def below(self, key: Key) -> Fault:
        """The same in a section that is itself at `key`."""
        return Fault(tuple((*key, *own) for own in self.keys), self.message, self.hint)

    def __str__(self) -> str:
        text = f"{'.'.join(map(str, self.keys[0]))}: {self.message}"
        return f"{text}; {self.hint}" if self.hint else text


LookUp = Callable[
    ["Recipe"], Sequence[Fault]
]  # what is wrong outside the recipe: files, functions, architectures


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is, what is wrong, and the way out."""

    file: str  # the recipe's path, "command line" for an override, "recipe" for a dictionary
    line: int | None  # counted from 1; None where there is no file
    key: str  # dotted, as written; "" = the whole file
    message: str  # names the value and the rule it broke
    hint: str = ""  # the way out

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line is not None else self.file
        text = f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"
        return f"{text}; {self.hint}" if self.hint else text


_SHOWN_ALIKE = 3  # lines with the same mistake that are written out


def _told(problems: Sequence[Problem]) -> Iterator[str]:
    """The problems as text; what is wrong in the same way on many lines is told for the first few."""
    alike: dict[Problem, list[Problem]] = {}
    for problem in problems:
        alike.setdefault(replace(problem, line=None), []).append(problem)
    for group in alike.values():
        shown, more = group[:_SHOWN_ALIKE], group[_SHOWN_ALIKE:]
        yield from map(str, shown)
        if more:
            lines = ", ".join(str(problem.line) for problem in more)
            yield f"{group[0].file}: and {len(more)} more line{'s' if more[1:] else ''}: {lines}"


class RecipeError(Exception):
    """A recipe that cannot be run. `problems` holds every mistake found, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]):
        unique = dict.fromkeys(problems)
        self.problems = sorted(unique, key=lambda p: (p.file, p.line or 0))
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        return "\n  ".join(
            [f"{count} problem{'s' if count != 1 else ''} in the recipe:", *_told(self.problems)]
        )

    def __reduce__(self) -> tuple:
        return (RecipeError, (self.problems,))
