"""Compiling at the first use: once, into the cache, and never in the way of a run that could do without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rlhf.kernels import gpu, native
from rlhf.kernels.activation import swiglu
from rlhf.kernels.linear import linear, pack
from rlhf.kernels.norm import add_rms_norm, rms_norm
from rlhf.kernels.rotary import rotate

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


def calls(grad: bool) -> list[torch.Tensor]:
    """One result of each operation over rows."""
    x, other, weight = (torch.ones(s, requires_grad=grad) for s in ((4, 64), (4, 64), (48, 64)))
    heads, angles, norm = torch.ones(4, 2, 32, requires_grad=grad), torch.ones(4, 32), torch.ones(64)
    out = [swiglu(x, other), rms_norm(x, norm, 1e-6), rotate(heads, angles, angles)]
    out += [linear(x, weight, None, pack(weight))]
    return out + ([] if grad else [add_rms_norm(x, other, norm, 1e-6)])


@pytest.mark.parametrize("grad", [False, True])
def test_tensors_without_memory_have_shapes(grad):
    """Would catch: a process that ends at address 0 where someone asks what a model would take."""
    with FakeTensorMode():
        got = calls(grad)
        for out in got if grad else ():
            out.sum().backward()
    assert [tuple(x.shape) for x in got] == [tuple(x.shape) for x in calls(grad)]
    assert all("Fake" in type(x).__name__ for x in got)


def test_a_traced_model_has_the_same_numbers():
    """Would catch: tracing that takes a tensor's stand-in for the tensor."""
    gate, up, norm = torch.randn(4, 64), torch.randn(4, 64), torch.randn(64)

    def layer(gate, up):
        return rms_norm(swiglu(gate, up), norm, 1e-6)

    assert torch.equal(torch.compile(layer, backend="eager")(gate, up), layer(gate, up))


def test_an_argument_that_is_no_number_is_named():
    """Would catch: a tensor given where its address is meant, and a dozen arguments to guess among."""
    if native.library("linear") is None:
        pytest.skip("no C++ compiler")
    run = native.function("linear", "linear_forward")
    for place, wrong in ((1, torch.ones(2)), (0, 0.5), (11, "1")):
        given = [0] * 12
        given[place] = wrong
        with pytest.raises(TypeError, match=f"argument {place} must be a number.*{type(wrong).__name__}"):
            run(*given)


def test_form_names_what_runs(monkeypatch):
    """Would catch: machines with and without a compiler, or a GPU, that a run takes for alike."""
    for there, form in ((True, "Triton and torch"), (False, "torch")):
        monkeypatch.setattr(gpu, "available", lambda there=there: there)
        assert native.form("cuda") == form
    monkeypatch.setattr(native, "library", lambda name: None)
    assert native.form("cpu") == "torch"
    monkeypatch.setattr(native, "library", lambda name: object() if name == "norm" else None)
    assert native.form("cpu") == "C++ and torch"
