"""Nothing that a controller started may outlive it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GONE_S = 30.0


class Driver:
    """A controller in a session of its own; it and all it starts carry a mark in their environment."""

    def __init__(self, how: str, folder: Path) -> None:
        self.mark = f"RLHF_TEST_MARK={uuid.uuid4()}"
        self.output = folder / "output.txt"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, name: value, "PYTHONPATH": str(ROOT), "HOME": str(folder)}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "runtime_driver.py"), how],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )

    def wait_for(self, word: str, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while word not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, f"{word!r} did not come: {self.output.read_text()}"
            time.sleep(0.1)

    @property
    def worker_pid(self) -> int:
        lines = self.output.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("pid ")).split()[1])

    @property
    def folder(self) -> str:
        """Where its Ray processes keep their files; "" before it has said so."""
        lines = self.output.read_text().splitlines()
        return next((line.split()[1] for line in lines if line.startswith("folder ")), "")

    def is_ours(self, process: Path) -> bool:
        """Whether it carries the mark, or has a file of Ray's folder open: a title may overwrite the mark."""
        if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
            return True
        folder = self.folder
        return bool(folder) and any(
            str(os.readlink(f)).startswith(folder) for f in (process / "fd").iterdir()
        )

    def left(self) -> list[str]:
        """Every process that descends from the controller, by its command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.is_ours(folder):
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
                    if state != "Z":
                        found.append(f"{folder.name} {state} {command}")
            except OSError:  # it ended while we looked
                continue
        return found

    def assert_gone(self, seconds: float = GONE_S) -> None:
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not self.left(), f"{self.left()}\n{self.output.read_text()}"

    def kill_all(self) -> None:
        for line in self.left():
            os.kill(int(line.split()[0]), signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path) -> Iterator:
    drivers = []

    def make(how: str) -> Driver:
        drivers.append(Driver(how, tmp_path))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.kill_all()


@pytest.mark.parametrize(("how", "code"), [("success", 0), ("exception", 1)])
def test_nothing_is_left_after_the_controller_ends(start, how, code, tmp_path):
    driver = start(how)
    assert driver.process.wait(timeout=120) == code, driver.output.read_text()
    driver.assert_gone(seconds=5.0)
    if how == "exception":
        assert "RuntimeError: the controller fails" in driver.output.read_text()
    assert driver.folder and not Path(driver.folder).exists(), "Ray's folder of this run was left"
    assert not (tmp_path / ".ray").exists(), (
        "a key to every cluster of this user was written to the home folder"
    )


def test_nothing_is_left_after_ctrl_c_twice(start):
    """As in a terminal, it reaches the whole process group; the second must not cut the cleaning short."""
    driver = start("busy")
    driver.wait_for("ready")
    time.sleep(0.5)  # let the call arrive
    os.killpg(driver.process.pid, signal.SIGINT)
    time.sleep(0.2)
    if driver.process.poll() is None:
        os.killpg(driver.process.pid, signal.SIGINT)
    assert driver.process.wait(timeout=GONE_S) != 0
    last = driver.output.read_text().splitlines()[-1]
    assert last == "KeyboardInterrupt", f"the controller got {last!r}, which it cannot tell from a failure"
    driver.assert_gone(seconds=5.0)


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_nothing_is_left_after_kill_9_of_the_controller(start, stopped):
    """Nobody is left to clean up: the processes must notice by themselves, a hung one included."""
    driver = start("busy")
    driver.wait_for("ready")
    if stopped:
        os.kill(driver.worker_pid, signal.SIGSTOP)
    driver.process.kill()
    driver.process.wait()
    driver.assert_gone()
    assert driver.folder and not Path(driver.folder).exists(), "Ray's folder of this run was left"
