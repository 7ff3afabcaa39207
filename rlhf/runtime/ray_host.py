"""What runs inside a Ray actor: one worker, and the reporting around it. Imports neither Ray nor torch.

Every call answers with two values: a small `Status` (did it raise, what was logged) and the result, so that
the controller can check a call without fetching its result. Also here: how the controller looks at such a
process on its own machine (state, stacks).
"""

from __future__ import annotations

import copy
import faulthandler
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.process import ProcessInfo
from rlhf.runtime.groups import load_worker_class
from rlhf.runtime.ports import free_port

_LOG_LINES = 1000  # kept for one call


@dataclass(frozen=True)
class Identity:
    """A process, so that it can be told apart from a later one with the same number."""

    machine: str  # boot id and pid namespace
    hostname: str
    pid: int
    started: str  # clock ticks since boot, from /proc
    stacks_fd: int  # where the process writes its stacks on SIGUSR1


@dataclass(frozen=True)
class Failed:
    """An exception on its way to the controller."""

    error: Exception | None  # None where it cannot be made again in another process
    summary: str  # "ValueError: ..."
    text: str  # the traceback as text
    time_s: float  # when, to tell the first failure of several from its consequences


@dataclass(frozen=True)
class Status:
    """How one call ended."""

    failed: Failed | None
    logs: tuple[tuple[str, int, str], ...]  # (logger, level, message) of the package's warnings
    terminated: bool  # this process was asked to stop (SIGTERM) since the last call


class Host:
    """The actor's class: makes a worker and calls its methods by name."""

    def __init__(self, cwd: str, sys_path: Sequence[str]) -> None:
        if os.path.isdir(cwd):
            os.chdir(cwd)
        sys.path.extend(entry for entry in sys_path if entry not in sys.path)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to answer
        self._stacks = tempfile.TemporaryFile()
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._logs = _LogBuffer()
        logging.getLogger("rlhf").addHandler(self._logs)
        self._terminated = False
        self._worker: Any = None

    def identity(self) -> Identity:
        pid = os.getpid()
        stacks = self._stacks.fileno()
        return Identity(this_machine(), socket.gethostname(), pid, process_started(pid), stacks)

    def free_port(self, address: str) -> int:
        return free_port(address)

    def build(self, worker: str, info: ProcessInfo, kwargs: Mapping[str, Any]) -> tuple[Status, None]:
        def make() -> None:
            self._worker = load_worker_class(worker)(info, **kwargs)

        status, _ = self._report(make)
        # only now: while Ray ends a process that has no worker yet, its own handler is the right one
        signal.signal(signal.SIGTERM, self._note_termination)
        return status, None

    def run(self, method: str, *args: Any, **kwargs: Any) -> tuple[Status, Any]:
        return self._report(lambda: getattr(self._worker, method)(*args, **kwargs))

    def close_worker(self) -> tuple[Status, None]:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        worker, self._worker = self._worker, None
        return self._report(worker.close) if hasattr(worker, "close") else self._report(lambda: None)

    def _report(self, action: Any) -> tuple[Status, Any]:
        result, failed = None, None
        try:
            result = action()
        except Exception as error:  # goes to the controller, which raises it
            failed = Failed(_portable(error), _summary(error), traceback.format_exc(), time.time())
        terminated, self._terminated = self._terminated, False
        return Status(failed, self._logs.take(), terminated), result

    def _note_termination(self, number: int, frame: object) -> None:
        self._terminated = True


class _LogBuffer(logging.Handler):
    """Warnings and errors of the package, kept until the next answer to the controller."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._records) < _LOG_LINES:
            self._records.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> tuple[tuple[str, int, str], ...]:
        taken, self._records = tuple(self._records), []
        return taken


def _portable(error: Exception) -> Exception | None:
    """The exception without its frames, if it can be made again from what it says about itself: not every
    class can, for example one whose constructor wants keywords."""
    try:
        return copy.deepcopy(error)
    except Exception:  # any class may fail in any way here; the traceback travels as text in every case
        return None


def _summary(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(type(error), error)).strip()


# -- looking at a process from outside -----------------------------------------------------------------------


def this_machine() -> str:
    """Equal in two processes if one can find the other in /proc by its number; "" where there is no /proc."""
    if not os.path.isdir("/proc/self"):
        return ""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def process_started(pid: int) -> str:
    """Start time of a process in clock ticks since boot, "" if there is none."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def process_state(process: Identity) -> str:
    """ "running", "stopped", "gone", or "unknown" on another machine."""
    if not process.machine or process.machine != this_machine():
        return "unknown"
    fields = _stat(process.pid)
    if not fields or fields[19] != process.started or fields[0] in "ZX":
        return "gone"
    return "stopped" if fields[0] in "Tt" else "running"


def _stat(pid: int) -> list[str]:
    """Fields of /proc/pid/stat from the state on."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def read_stacks(process: Identity, wait_s: float = 1.0) -> str:
    """The stacks of a running process on this machine, "" if it cannot tell."""
    if process_state(process) != "running":
        return ""
    path = f"/proc/{process.pid}/fd/{process.stacks_fd}"
    try:
        before = os.path.getsize(path)
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(wait_s)
        with open(path, "rb") as file:
            file.seek(before)
            return file.read().decode(errors="replace").strip()
    except OSError:  # it ended in between
        return ""
