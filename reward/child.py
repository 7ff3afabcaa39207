"""What runs in the processes of the reward functions: `child.py DESCRIPTOR PARENT` (see `rlhf.reward.process`).

There are two: one runs the functions, and one waits for it or for the run to end and then ends everything that the
functions have started, in sessions of their own too. Only Linux can follow those; elsewhere there is no second one.

Requests come pickled from the run, which is trusted; answers go back as JSON, so that nothing that a function returns
is ever unpickled. Imports the standard library only until the run has said where the rest is found.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection

_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER
_SWEEP_S = 10.0  # longest time for ending what the functions have started
_LONGEST_LINE = 200  # characters of an error in one line


class _Ended(Exception):
    """The run has no further use for the functions, or is gone."""


def main() -> None:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    if sys.platform == "linux":
        _order(_ADOPT_ORPHANS, 1)
        guard = os.getpid()
        functions = os.fork()
        if functions:
            os.close(descriptor)
            _guard(functions, parent)
        _end_with(guard, signal.SIGKILL)
    _serve(Connection(descriptor))


def _serve(connection: Connection) -> None:
    path, names = connection.recv()
    sys.path[:] = path
    functions, failures = _resolve_all(names)
    connection.send_bytes(json.dumps(failures).encode())
    while True:
        try:
            part, prompts, responses, keywords = connection.recv()
        except EOFError:  # the run has no further use for it
            return
        answer = _answer(part, functions[part], prompts, responses, keywords)
        connection.send_bytes(json.dumps(answer).encode())


def _order(what: int, value: int) -> None:
    ctypes.CDLL(None).prctl(what, value)


def _end_with(parent: int, order: signal.Signals) -> None:
    """Get `order` when the parent is gone, even in the middle of an endless loop."""
    _order(_DIE_WITH_PARENT, order)
    if os.getppid() != parent:
        os.kill(os.getpid(), order)


def _guard(functions: int, run: int) -> None:
    """Wait for the functions' process, or for the run's word (SIGTERM) or its end; end what is left, and end as the
    functions' process did. Never returns."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Ended

    signal.signal(signal.SIGTERM, end)
    code = 0
    try:
        _end_with(run, signal.SIGTERM)
        reaped = 0
        while reaped != functions:  # orphans come here too
            reaped, status = os.wait()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = os.waitstatus_to_exitcode(status)
    except _Ended:
        pass
    _end_children()
    if code < 0:
        _end_by(-code)
    os._exit(max(code, 0))


def _end_by(number: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it is not this process that has crashed
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _end_children() -> None:
    """Kill the children until there are none: those of a dead child become this process's own."""
    deadline = time.monotonic() + _SWEEP_S
    while time.monotonic() < deadline:
        for pid in _children():
            with contextlib.suppress(OSError):  # it has ended, or it is somebody else's now
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _children() -> list[int]:
    own, found = os.getpid(), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                if int(file.read().rpartition(b") ")[2].split()[1]) == own:
                    found.append(int(name))
        except OSError:  # it has ended
            continue
    return found


def _resolve_all(names: dict[str, str]) -> tuple[dict, dict]:
    """(functions, failures), both by part."""
    from rlhf.reward.functions import resolve

    functions, failures = {}, {}
    for part, name in names.items():
        try:
            functions[part] = resolve(name)
        except Exception as error:  # said by the run, which has found the function
            failures[part] = one_line(error)
    return functions, failures


def _answer(part: str, function, prompts: list, responses: list, keywords: dict) -> dict:
    from rlhf.reward.results import RewardError, read_result

    try:
        result = function(prompts, responses, **keywords)
    except BaseException as error:  # told to the run, SystemExit included
        return {"raised": describe(error), "leaves": not isinstance(error, Exception)}
    try:
        judgements = read_result(part, result, len(responses))
    except RewardError as error:
        return {"contract": str(error)}
    return {"values": [[j.value, j.error] for j in judgements]}


def describe(error: BaseException) -> dict[str, str]:
    """An exception in words: what, where (to tell two errors apart), and the whole traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return {"line": one_line(error), "where": f"{type(error).__name__} {where}", "text": text}


def one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_LINE else text[:_LONGEST_LINE] + "..."


if __name__ == "__main__":
    main()
