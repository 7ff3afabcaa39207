"""Ends everything that belongs to a Ray cluster of our own, however its controller ended.

Run as a script, as a child of the controller: `watchdog.py FOLDER PARENT`. When its standard input closes, or
when its parent is gone (kill -9), it kills every process that belongs to FOLDER and removes FOLDER. Ray ends
most of its processes by itself; its agents stay for a while after their controller was killed, and a stopped
process for ever.

A process belongs to the folder if it has a file in it open for writing (Ray's own processes keep their logs
there), or carries the folder's mark in its environment (what a worker started). One of the two would not do:
Ray's agents overwrite their environment with their title, a worker's children need not write into the folder.

Imports the standard library only. Where there is no /proc it removes the folder and no more.
"""

import os
import select
import shutil
import signal
import stat
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


def belonging(folder: str) -> list[int]:
    """Living processes of ours that belong to the folder."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        if not name.isdigit():
            continue
        try:
            if _is_alive(name) and (_has_mark(name, folder) or _writes_into(name, folder)):
                found.append(int(name))
        except OSError:  # it ended, or it is somebody else's
            continue
    return found


def _is_alive(pid: str) -> bool:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b") ")[2][:1] not in (b"Z", b"X", b"")


def _has_mark(pid: str, folder: str) -> bool:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return f"{MARK_NAME}={folder}".encode() in file.read().split(b"\0")


def _writes_into(pid: str, folder: str) -> bool:
    for number in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{number}"
        try:
            if os.readlink(link).startswith(folder + "/") and os.lstat(link).st_mode & stat.S_IWUSR:
                return True
        except FileNotFoundError:  # closed in between
            continue
    return False


def sweep(folder: str, spared: set[int]) -> None:
    """Kill until none is left: one that is just starting may be missed the first time."""
    deadline = time.monotonic() + SWEEP_S
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        pids = set(belonging(folder)) - spared
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        quiet = 0 if pids else quiet + 1
        time.sleep(0.1)


def main() -> None:
    folder, parent = sys.argv[1], int(sys.argv[2])
    wait_for_the_end(parent)
    spared = {parent} if os.getppid() == parent else set()  # it may have ended the cluster and live on
    sweep(folder, spared)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
