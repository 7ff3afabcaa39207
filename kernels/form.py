"""Which form of each operation ran: every public operation of this folder says so.

Here: `took`, which an operation calls where it has chosen; `forms`, the calls of each form since `forget`; `told`, the same
for people. Operations called by others count where they run: log-probs of a head are linears too. Not here: the choice,
which is each operation's own.
"""

from __future__ import annotations

from collections import defaultdict

TRITON, NATIVE, ONEDNN, TORCH = "triton", "native", "onednn", "torch"
_calls: defaultdict[str, dict[str, int]] = defaultdict(dict)  # operation: form: calls


def took(operation: str, form: str) -> None:
    """Counts a call; of threads that do it at the same moment one may be lost."""
    calls = _calls[operation]
    calls[form] = calls.get(form, 0) + 1


def forms() -> dict[str, dict[str, int]]:
    """Operation -> form -> calls."""
    return {operation: dict(calls) for operation, calls in sorted(_calls.items()) if calls}


def forget() -> None:
    _calls.clear()


def told() -> str:
    """As "attention native, linear native and onednn"."""
    return ", ".join(f"{operation} {' and '.join(sorted(calls))}" for operation, calls in forms().items())
