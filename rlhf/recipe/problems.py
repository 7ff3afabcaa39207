"""What a refused recipe says: one Problem per mistake, all of them in one RecipeError.

Here: the report. Not here: how a mistake is found (`tree`, `check`, `load`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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


class RecipeError(Exception):
    """A recipe that cannot be run. `problems` holds every mistake found, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]):
        unique = dict.fromkeys(problems)
        self.problems = sorted(unique, key=lambda p: (p.file, p.line or 0))
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"{count} problem{'s' if count != 1 else ''} in the recipe:", *map(str, self.problems)]
        return "\n  ".join(lines)

    def __reduce__(self) -> tuple:
        return (RecipeError, (self.problems,))
