"""What runs in the process of the reward functions: `child.py DESCRIPTOR PARENT` (see `rlhf.reward.process`).

Requests come pickled from the run, which is trusted; answers go back as JSON, so that nothing that a function returns
is ever unpickled. Imports the standard library only until the run has said where the rest is found.
"""

import ctypes
import json
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_LONGEST_LINE = 200  # characters of an error in one line


def main() -> None:
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    _end_with(parent)
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


def _end_with(parent: int) -> None:
    """Be killed when the run is, even in the middle of an endless loop; where the system has no such order, at the next
    request that does not come."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


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
