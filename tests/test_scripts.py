"""The set-up script: what it says when it cannot, and that it does nothing twice. Installs nothing: pip is a stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "a folder with spaces"
    root.mkdir()
    shutil.copytree(REPO / "scripts", root / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, root / name)
    # An environment whose python only notes what it was asked to do, and fails where the test says so.
    executable(
        root / ".venv" / "bin" / "python",
        '#!/bin/sh\nprintf "%s\\n" "$*" >> "$PIP_LOG"\ncase "$*" in *"pip install"*) exit "${PIP_RC:-0}";; esac\n',
    )
    return root


def setup(checkout: Path, *extras: str, **environment: str):
    log = checkout.parent / "pip.log"
    log.write_text("")
    done = subprocess.run(
        ["bash", str(checkout / "scripts" / "setup.sh"), *extras],
        cwd=checkout.parent,
        env={**os.environ, "PIP_LOG": str(log), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, [line for line in log.read_text().splitlines() if "pip install" in line]


def test_it_installs_once_for_what_is_asked(checkout):
    """Catches: a second quickstart that resolves everything again, or a changed pin that is not installed."""
    done, installs = setup(checkout)
    assert done.returncode == 0, done.stderr
    assert len(installs) == 1 and installs[0].endswith("-c constraints.txt -e .")
    assert setup(checkout)[1] == []
    assert [i.endswith("-e .[dev]") for i in setup(checkout, "dev")[1]] == [True]
    assert setup(checkout, "dev")[1] == [] and setup(checkout)[1] == []
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert len(setup(checkout)[1]) == 1
    assert len(setup(checkout, "dev")[1]) == 1


def test_the_test_extras_serve_the_quickstart_too(checkout):
    assert len(setup(checkout, "dev")[1]) == 1
    assert setup(checkout)[1] == []


def test_a_moved_checkout_is_set_up_again(checkout):
    """Catches: an editable installation that still points at the old folder."""
    setup(checkout)
    moved = checkout.rename(checkout.with_name("moved"))
    assert len(setup(moved)[1]) == 1


def test_a_failed_installation_is_not_taken_for_done(checkout):
    done, _ = setup(checkout, PIP_RC="1")
    assert done.returncode == 1 and "pip could not install the packages" in done.stderr
    assert len(setup(checkout)[1]) == 1


def test_an_old_python_is_named(checkout, tmp_path):
    shutil.rmtree(checkout / ".venv")
    old = executable(
        tmp_path / "old" / "python3", '#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.8.2" && exit 0\nexit 1\n'
    )
    done, _ = setup(checkout, PYTHON=str(old))
    assert done.returncode == 1 and "is not a working Python >= 3.10 (Python 3.8.2)" in done.stderr
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "tr", "dirname", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    done, _ = setup(checkout, PATH=f"{tools}:{old.parent}")
    assert done.returncode == 1 and "needs Python >= 3.10; python3 here is Python 3.8.2" in done.stderr
    done, _ = setup(checkout, PATH=str(tools))
    assert done.returncode == 1 and "needs Python >= 3.10" in done.stderr and "missing" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_without_venv_and_pip_is_told_what_to_install(checkout, tmp_path):
    shutil.rmtree(checkout / ".venv")
    bare = executable(
        tmp_path / "bare" / "python3",
        '#!/bin/sh\ncase "$*" in\n-V) echo "Python 3.11.2";;\n*version_info*) exit 0;;\n*) exit 1;;\nesac\n',
    )
    done, _ = setup(checkout, PYTHON=str(bare))
    assert done.returncode == 1 and "apt-get install python3-venv" in done.stderr


@pytest.mark.parametrize(
    "script", ["scripts/setup.sh", "scripts/quickstart.sh", "scripts/test.sh", "scripts/parity.sh", ".ci/run"]
)
def test_the_scripts_parse(script):
    subprocess.run(["bash", "-n", str(REPO / script)], check=True, timeout=10)
    assert os.access(REPO / script, os.X_OK)
