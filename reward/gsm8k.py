"""The GSM8K rule: find the final number of a solution and compare it exactly with the reference's.

Here: reading a number out of text, in time linear in the text. Not here: mathematics beyond numbers and
simple fractions (for this rule `2x+1` after a marker is no answer), and scoring (`rlhf.reward.functions`).
"""

from __future__ import annotations

import re
from fractions import Fraction

_MARKER = re.compile(r"####|^[ \t]*A:", re.MULTILINE)
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-"})  # typographic minus and dash
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?"
# A minus counts as a sign unless something before it makes it an operator: "20-2" ends in 2, not in -2.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)%])-)?(?:\$(?P<sign_after>-)?)?"
    rf"(?=\.?[0-9])(?P<top>{_UNSIGNED})(?:/(?P<bottom>{_UNSIGNED}))?",
    re.ASCII,
)
# What may not follow an answer: the number would be part of an expression, of a list or of a larger number.
_GOES_ON = re.compile(
    r"[ \t]*(?:(?:[+/^=]|\*{1,2})[ \t]*[\w$(.-]|-[ \t]*[0-9]|[,.][0-9])"
    r"|[ \t]*(?:hundred|thousand|million|billion|dozen)\b|\(",
    re.IGNORECASE,
)
_MAX_DIGITS = 100  # longer numbers are no answers; the bound keeps exact arithmetic cheap


def final_number(text: str) -> Fraction | None:
    """The final number of a solution, exactly; None where there is none.

    With a marker (`####` anywhere, or `A:` at the beginning of a line) it is the first number on the line
    after the last marker, and it must stand alone: `#### 3+4`, `#### 1,2` and `A: 2 million` hold no number.
    Without a marker it is the last number of the text. `$`, `%`, thousands commas, trailing zeros and a final
    full stop do not matter; `1/4` is a fraction. Time is linear in the text.
    """
    text = text.translate(_MINUS)
    markers = list(_MARKER.finditer(text))
    if markers:
        line = text[markers[-1].end() :].lstrip().partition("\n")[0]
        match = _NUMBER.search(line)
        if match is None or _GOES_ON.match(line, match.end()):
            return None
        return _value(match)
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    return None if match is None else _value(match)


def is_correct(response: str, reference: str) -> bool:
    """Whether the response's final number equals the reference's.

    Raises ValueError if the reference holds none: that is a fault of the data, not a wrong answer.
    """
    want = final_number(reference)
    if want is None:
        raise ValueError(
            f"the reference {_tail(reference)!r} holds no final number; the gsm8k rule needs one"
        )
    return final_number(response) == want


def _value(match: re.Match[str]) -> Fraction | None:
    top, bottom = match["top"], match["bottom"]
    if len(match.group()) > _MAX_DIGITS:
        return None
    value = Fraction(top.replace(",", ""))
    if bottom:
        divisor = Fraction(bottom.replace(",", ""))
        if divisor == 0:
            return None
        value /= divisor
    return -value if match["sign"] or match["sign_after"] else value


def _tail(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else "..." + text[-limit:]
