"""Named places at which a run can be made to fail, to prove that it survives.

Nothing happens unless the environment variable RLHF_FAULTS is set. It holds entries `point@step=kind`, separated by
commas: `RLHF_FAULTS=checkpoint.before_rename@4=kill9`. `step` is the run's step (`*` = any); a fault fires once per
process. Kinds: kill9, term, raise, sleep (60 s), enospc.
"""

from __future__ import annotations

import errno
import os
import signal
import time

POINTS = (
    "rollout.mid",
    "reward.mid",
    "reference.mid",
    "train.forward",
    "train.backward",
    "optimizer.before",
    "optimizer.after",
    "publish.mid",
    "checkpoint.write",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.delete_old",
    "track",
    "stage.export",
    "stage.finished",
)

KINDS = ("kill9", "term", "raise", "sleep", "enospc")


class InjectedFault(RuntimeError):
    """Raised by a fault of kind `raise`."""


_VARIABLE = "RLHF_FAULTS"
_current_step: int | None = None
_armed: list[tuple[str, str, str]] | None = None


def faults_are_set() -> bool:
    """Whether this run was asked to fail anywhere, in whichever of its processes."""
    return bool(os.environ.get(_VARIABLE))


def at_step(step: int) -> None:
    """Tell the fault points which step this process is in."""
    global _current_step
    _current_step = step


def fault_point(name: str) -> None:
    """Fail here if RLHF_FAULTS asks for it; otherwise cost nothing."""
    global _armed
    if _armed is None:
        _armed = _parse(os.environ.get(_VARIABLE, ""))
    for entry in list(_armed):
        point, step, kind = entry
        if point == name and step in ("*", str(_current_step)):
            _armed.remove(entry)
            _fail(name, kind)


def _parse(text: str) -> list[tuple[str, str, str]]:
    entries = []
    for item in filter(None, text.split(",")):
        where, _, kind = item.partition("=")
        point, _, step = where.partition("@")
        if point not in POINTS or kind not in KINDS:
            raise ValueError(
                f"RLHF_FAULTS entry {item!r}: want point@step=kind, point in {POINTS}, kind in {KINDS}"
            )
        entries.append((point, step or "*", kind))
    return entries


def _fail(name: str, kind: str) -> None:
    if kind == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "sleep":
        time.sleep(60)
    elif kind == "enospc":
        raise OSError(errno.ENOSPC, f"injected at {name}")
    else:
        raise InjectedFault(f"injected at {name}")
