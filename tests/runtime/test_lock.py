"""One run per directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf.runtime.lock import RunInUseError, run_lock
from tests.e2e.running import ROOT, TINY


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_second_run_in_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    """Would catch: two runs that write one metrics file. The lock goes with the process, however it ends."""
    code = "import sys; from rlhf.runtime.lock import run_lock\nwith run_lock(sys.argv[1]): pass"
    with run_lock(tmp_path):
        with pytest.raises(RunInUseError, match=f"process {os.getpid()}, started 20"), run_lock(tmp_path):
            pass
        other = python(code, tmp_path)
        assert other.returncode == 1 and f"process {os.getpid()}, started 20" in other.stderr
    assert python(code, tmp_path).returncode == 0
    killed = code.replace("pass", "import os; os.kill(os.getpid(), 9)")
    assert python(killed, tmp_path).returncode == -signal.SIGKILL
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("more", [[], ["--fresh"]], ids=["again", "fresh"])
def test_a_second_start_is_refused_before_torch_is_loaded(tmp_path: Path, more: list[str]) -> None:
    """Would catch: half a minute of loading before a message that a file could give."""
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(TINY | {"run": {"name": "x", "output_dir": str(tmp_path)}})
    )
    code = "import sys; sys.modules['torch'] = None; from rlhf.cli import main; main()"
    with run_lock(tmp_path / "x"):
        done = python(code, "train", tmp_path / "recipe.yaml", *more)
    assert done.returncode == 1 and "in use by another run" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("x.old*"))
