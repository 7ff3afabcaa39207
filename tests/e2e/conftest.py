"""Fixtures of whole-run tests."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tests.e2e.running import TINY, trainer_in


@pytest.fixture
def tiny() -> dict:
    """A copy of the recipe, to be changed at will."""
    return copy.deepcopy(TINY)


@pytest.fixture
def train(tmp_path):
    """train(recipe, *overrides, name=..., faults=..., env=...) -> (finished process, run directory)."""
    return trainer_in(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The run directory of the recipe as it is, never interrupted; to be read only."""
    done, run_dir = trainer_in(tmp_path_factory.mktemp("whole"))(TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir
