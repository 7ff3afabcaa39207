"""The lock that keeps two runs out of one directory. Imports no torch: the command line asks before it loads any."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LOCK = "run.lock"

_held_here: dict[Path, dict[str, Any]] = {}


class RunInUseError(RuntimeError):
    """Another run holds the run directory."""


def check_not_in_use(run_dir: Path) -> None:
    """Raise RunInUseError if another run holds `run_dir` now; makes no directory."""
    if (run_dir / LOCK).is_file():
        with run_lock(run_dir):
            pass


@contextlib.contextmanager
def run_lock(run_dir: Path | str) -> Iterator[None]:
    """Hold `run_dir` for this process. Raises RunInUseError naming host, process and start of the run that
    has it.

    The operating system frees the lock when the process ends, however it ends.
    """
    path = Path(run_dir).resolve() / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    # A record lock belongs to the process: a child that outlives a killed run does not keep it. In return
    # this process would be granted it twice, and loses it if it ever opens and closes the file a second time.
    if path in _held_here:
        raise RunInUseError(_in_use(path, _held_here[path]))
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise RunInUseError(_in_use(path, _read_owner(path))) from None
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        _held_here[path] = owner
        try:
            file.truncate(0)
            json.dump(owner, file)
            file.flush()
            yield
            file.truncate(0)
        finally:
            del _held_here[path]


def _read_owner(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8").strip()
    return json.loads(text) if text else {"host": "unknown", "pid": "unknown", "started": "this moment"}


def _in_use(path: Path, owner: Mapping[str, Any]) -> str:
    return (
        f"{path.parent} is in use by another run: host {owner['host']}, process {owner['pid']}, started "
        f"{owner['started']}. Stop that run, or give this one another run.name"
    )
