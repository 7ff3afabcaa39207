"""Ends everything that belongs to a Ray cluster of our own, however its controller ended.

Run as a script, as a child of the controller: `watchdog.py MARK FOLDER PARENT`. When its standard input
closes, or when its parent is gone (kill -9), it kills every process whose environment holds MARK and removes
FOLDER. Ray ends most of its processes by itself; its agents stay for a while after their controller was
killed, and a stopped process for ever.

Imports the standard library only. Where there is no /proc it removes the folder and no more.
"""

import os
import select
import shutil
import signal
import sys
import time

MARK_NAME = "RLHF_RAY_CLUSTER"
_POLL_S = 0.5
SWEEP_S = 20.0  # longest sweep


def wait_for_the_end(parent: int) -> None:
    """Return when the controller says so or is no more."""
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], _POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            return


def marked(mark: str) -> list[int]:
    """Living processes of ours that have the mark in their environment."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                belongs = f"{MARK_NAME}={mark}".encode() in file.read().split(b"\0")
            with open(f"/proc/{name}/stat") as file:
                alive = file.read().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:  # it ended, or it is somebody else's
            continue
        if belongs and alive:
            found.append(int(name))
    return found


def sweep(mark: str) -> None:
    """Kill until none is left: one that is just starting may be missed the first time."""
    deadline = time.monotonic() + SWEEP_S
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        pids = marked(mark)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        quiet = 0 if pids else quiet + 1
        time.sleep(0.1)


def main() -> None:
    mark, folder, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
    wait_for_the_end(parent)
    sweep(mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
