"""Compiling at the first use: once, into the cache, and never in the way of a run that could do without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.kernels import gpu, native

PROGRAM = "from rlhf.kernels import native; print(native.library('activation') is not None)"


def has_library(cache: Path, **env: str) -> tuple[bool, str]:
    """What a fresh process finds, and what it says."""
    env = {**os.environ, "PYTHONPATH": ".", "XDG_CACHE_HOME": str(cache), **env}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip() == "True", done.stderr


def files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_compiled_once_and_found_again(tmp_path):
    """Would catch: a compilation in every process, or drafts left behind."""
    if native.library("attention") is None:
        pytest.skip("no C++ compiler")
    assert has_library(tmp_path)[0]
    (built,) = files(tmp_path)
    made = built.stat().st_mtime_ns
    assert has_library(tmp_path)[0]
    assert files(tmp_path) == [built] and built.stat().st_mtime_ns == made


@pytest.mark.parametrize("env", [{"RLHF_NATIVE": "0"}, {"PATH": "/nowhere"}], ids=str)
def test_without_a_compiler_torch_runs_and_nothing_is_said(tmp_path, env):
    """Would catch: a machine without a compiler, or a user who wants none, being refused or pestered."""
    assert has_library(tmp_path, **env) == (False, "")
    assert not files(tmp_path)


def test_a_compiler_that_fails_is_named_once_and_not_fatal(tmp_path):
    """Would catch: a broken tool chain that ends a run."""
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'cc1plus: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    found, said = has_library(tmp_path / "cache", PATH=f"{compiler.parent}:/usr/bin:/bin")
    assert not found and not files(tmp_path / "cache")
    assert said.strip() == "rlhf: activation.cpp was not compiled, torch runs instead: cc1plus: no such thing"


def test_a_library_that_cannot_be_loaded_is_not_fatal(tmp_path):
    """Would catch: a file in the cache that another tool put there, or a cache that may hold no programs, that ends every run."""
    if native.library("attention") is None:
        pytest.skip("no C++ compiler")
    has_library(tmp_path)
    (built,) = files(tmp_path)
    built.write_bytes(b"not a library")
    found, said = has_library(tmp_path)
    assert not found and "activation.cpp was not compiled, torch runs instead" in said


def test_form_names_what_runs(monkeypatch):
    """Would catch: machines with and without a compiler, or a GPU, that a run takes for alike."""
    for there, form in ((True, "Triton and torch"), (False, "torch")):
        monkeypatch.setattr(gpu, "available", lambda there=there: there)
        assert native.form("cuda") == form
    monkeypatch.setattr(native, "library", lambda name: None)
    assert native.form("cpu") == "torch"
    monkeypatch.setattr(native, "library", lambda name: object() if name == "norm" else None)
    assert native.form("cpu") == "C++ and torch"
