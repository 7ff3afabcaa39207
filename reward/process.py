"""A process for reward functions, which can be killed: a thread that loops for ever cannot.

One process serves every function of a scorer; it is started at once, imports while the models load, and is started
again after it was killed or has died. It is no fork: the run's models and its CUDA context are not in it. What the
functions have started ends with it, and what they print goes to a file. Not here: what happens in it
(`rlhf.reward.child`), and which functions go there (`rlhf.reward.score`).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rlhf.reward import child
from rlhf.reward.results import Judgement, RewardError

_START_S = 300.0  # for importing the functions' modules
_END_S = 15.0  # for a process that has closed its connection, or was told to end, to be gone


class RewardTimeout(Exception):
    """A reward function did not return before its deadline."""


class FunctionFailed(Exception):
    """A reward function raised, or its process died of it."""

    def __init__(self, line: str, *, where: str, text: str, raised: bool = True) -> None:
        super().__init__(line)
        self.line = line
        self.where = where  # equal for two failures that need one traceback between them
        self.text = text
        self.raised = raised  # False: its process has died


class NotSendable(Exception):
    """The arguments of a call cannot be pickled."""


class RewardProcess:
    """Calls functions by name in a process of their own. `names` are what `rlhf.reward.functions.resolve` takes, by
    part; what the functions print is appended to the file `output` (None: it goes where the run's own goes)."""

    def __init__(self, names: Mapping[str, str], *, output: Path | None = None) -> None:
        self._names, self._output = dict(names), output
        self._running: list[tuple[subprocess.Popen, Connection]] = []  # one, or none
        self._failures: dict[str, str] | None = None  # parts that it could not import; None = not heard yet
        self._finalizer = weakref.finalize(self, _end_all, self._running)  # at the latest when the run ends
        self._start()

    def failures(self) -> Mapping[str, str]:
        """Why it cannot run some of the parts; waits until it has imported their modules. Raises RewardError if it does
        not come up."""
        if self._running and self._running[0][0].poll() is not None:
            _end_all(self._running)
        if not self._running:
            self._start()
        if self._failures is None:
            during = f"it imported {', '.join(self._names.values())}"
            try:
                self._failures = self._receive(time.monotonic() + _START_S, during=during)
            except FunctionFailed as error:
                raise RewardError(error.line) from error
            except RewardTimeout:
                raise RewardError(
                    f"the process of the reward functions was not ready in {_START_S:g} s while {during}"
                ) from None
        return self._failures

    def call(
        self,
        part: str,
        prompts: list[str],
        responses: list[str],
        keywords: Mapping[str, Any],
        deadline: float,
    ) -> list[Judgement]:
        """One function's judgements of n responses, in their order.

        Raises RewardTimeout at the deadline (time.monotonic), after the process was killed; FunctionFailed;
        RewardError for a broken contract; NotSendable.
        """
        if time.monotonic() >= deadline:
            raise RewardTimeout
        self.failures()
        _, connection = self._running[0]
        try:
            with contextlib.suppress(OSError):  # it is gone: `_receive` says how
                connection.send((part, prompts, responses, dict(keywords)))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise NotSendable(str(error)) from error
        answer = self._receive(deadline, during=f"{part} ran")
        if "raised" in answer and answer["leaves"]:
            raise RewardError(f"reward function {part}: raised {answer['raised']['line']}")
        if "raised" in answer:
            raise FunctionFailed(**answer["raised"])
        if "contract" in answer:
            raise RewardError(answer["contract"])
        return [Judgement(value, error) for value, error in answer["values"]]

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        with open(self._output, "ab") if self._output else contextlib.nullcontext() as output:
            process = subprocess.Popen(
                # -u: what a function has printed is there when it dies
                [sys.executable, "-u", child.__file__, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is the run's to answer
            )
        theirs.close()
        self._running.append((process, ours))
        self._failures = None
        with contextlib.suppress(OSError):  # it is gone: `_receive` says how
            ours.send(([os.path.abspath(entry) for entry in sys.path], self._names))

    def _receive(self, deadline: float, *, during: str) -> dict[str, Any]:
        process, connection = self._running[0]
        try:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                return json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may live on with its connection closed
                process.wait(_END_S)
            _end_all(self._running)
            code = process.returncode
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            line = f"the process of the reward functions {how} while {during}"
            raise FunctionFailed(line, where=how, text=line, raised=False) from None
        _end_all(self._running)
        raise RewardTimeout


def _end_all(running: list[tuple[subprocess.Popen, Connection]]) -> None:
    """End the process and everything that it has started."""
    while running:
        process, connection = running.pop()
        connection.close()
        if sys.platform == "linux" and _ends_by_itself(process):
            continue
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ends_by_itself(process: subprocess.Popen) -> bool:
    """Tell it to end what the functions have started, and wait until it has."""
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        return False
    return True
