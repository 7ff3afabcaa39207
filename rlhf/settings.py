"""Giving a formula the settings that it names.

The functions of a table (`OBJECTIVES`, `PREFERENCE_LOSSES`, ...) have keyword-only parameters named after fields of
their recipe section, and no defaults: a new one is a function and an entry in the table, nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any


@cache
def setting_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def bind(function: Callable[..., Any], section: Any, **given: Any) -> Callable[..., Any]:
    """The function with every keyword-only parameter that is not `given` taken from the section's field of that name.

    Raises AttributeError where the section has no such field.
    """
    names = [name for name in setting_names(function) if name not in given]
    return partial(function, **given, **{name: getattr(section, name) for name in names})
