"""Fixtures of whole-run tests."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import yaml

from tests.e2e.running import ROOT, TINY


@pytest.fixture
def tiny() -> dict:
    """A copy of the recipe, to be changed at will."""
    return copy.deepcopy(TINY)


@pytest.fixture
def train(tmp_path):
    """train(recipe, *overrides, name=..., faults=...) -> (finished process, run directory)."""

    def run(recipe: dict, *overrides: str, name: str = "tiny", faults: str = "", timeout: int = 240):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        env = os.environ | {"PYTHONPATH": str(ROOT), "RLHF_FAULTS": faults, "WANDB_MODE": "offline"}
        command = [sys.executable, "-m", "rlhf.cli", "train", str(path), f"run.name={name}", *overrides]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        return done, tmp_path / "runs" / name

    return run
