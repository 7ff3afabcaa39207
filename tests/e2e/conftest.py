"""Fixtures of whole-run tests."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from tests.e2e.running import ROOT, TINY


@pytest.fixture
def tiny() -> dict:
    """A copy of the recipe, to be changed at will."""
    return copy.deepcopy(TINY)


def _trainer(folder: Path):
    def run(
        recipe: dict,
        *overrides: str,
        name: str = "tiny",
        faults: str = "",
        timeout: int = 240,
        env: Mapping[str, str] | None = None,
    ):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        variables = {"PYTHONPATH": str(ROOT), "RLHF_FAULTS": faults, "WANDB_MODE": "offline", **(env or {})}
        command = [sys.executable, "-m", "rlhf.cli", "train", str(path), f"run.name={name}", *overrides]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=timeout, check=False
        )
        return done, folder / "runs" / name

    return run


@pytest.fixture
def train(tmp_path):
    """train(recipe, *overrides, name=..., faults=..., env=...) -> (finished process, run directory)."""
    return _trainer(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The run directory of the recipe as it is, never interrupted; to be read only."""
    done, run_dir = _trainer(tmp_path_factory.mktemp("whole"))(TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir
