"""A run in several Ray groups whose processes are killed: exact when it goes on, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import assert_same_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GONE_S = 30.0
PLACEMENT = {
    "train": {"roles": ["actor"]},
    "reference": {"roles": ["reference"]},
    "sample": {"roles": ["rollout"]},
}


class Traces:
    """Finds what a run has started: by a mark in the environment, and by files open in its temporary folder (a Ray
    process may have overwritten its environment with its title)."""

    def __init__(self) -> None:
        self.mark = {"RLHF_TEST_MARK": str(uuid.uuid4())}
        self.folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # short: it will hold Unix sockets

    @property
    def environment(self) -> dict[str, str]:
        return {**self.mark, "TMPDIR": str(self.folder)}

    def processes(self) -> list[str]:
        """pid, state and command line of those that live."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and self._is_ours(folder):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
                    found.append(f"{folder.name} {state} {command}")
            except OSError:  # it ended while we looked
                continue
        return found

    def _is_ours(self, process: Path) -> bool:
        (name, value), *_ = self.mark.items()
        if f"{name}={value}".encode() in (process / "environ").read_bytes().split(b"\0"):
            return True
        return any(os.readlink(f).startswith(f"{self.folder}/") for f in (process / "fd").iterdir())

    def assert_gone(self) -> None:
        deadline = time.monotonic() + GONE_S
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not self.processes()
        assert not list(self.folder.glob("rlhf-ray-*")), "Ray's folder was left"


@pytest.fixture
def traces() -> Iterator[Traces]:
    traces = Traces()
    yield traces
    for line in traces.processes():
        os.kill(int(line.split()[0]), signal.SIGKILL)
    shutil.rmtree(traces.folder, ignore_errors=True)


def test_killed_controller_sampler_and_trainer_is_the_uninterrupted_run(tiny, train, whole, traces):
    """Would catch: a cluster or a worker that outlives its controller, a controller that waits for a dead worker, engines
    that sample from weights of before the kill, state that only one of the processes had."""
    spread = tiny | {"placement": PLACEMENT, "runtime": {"backend": "ray", "threads": 1}}
    kills = (
        ("rollout.mid@6", 1, "group 'sample': rank 0"),  # in the sampling actor, mid-generation
        ("track@7", -9, ""),  # the controller
        ("optimizer.after@9", 1, "group 'train': rank 0"),  # in the training actor
        ("publish.mid@10", -9, ""),  # the controller, with half of the weights sent
    )
    for point, code, says in kills:
        done, _ = train(spread, name="spread", faults=f"{point}=kill9", env=traces.environment)
        shown = done.stdout + done.stderr
        assert done.returncode == code and says in shown, (point, done.returncode, shown)
        assert not says or "died during" in shown, shown
        traces.assert_gone()
    done, run_dir = train(spread, name="spread", env=traces.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    traces.assert_gone()
    assert_same_run(whole, run_dir)
