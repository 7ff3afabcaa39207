import os

import pytest
import torch

from benchmarks.gpu import interpreter
from rlhf.kernels import gpu, native, threads

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs its kernels on the CPU


@pytest.fixture(params=["triton"] if INTERPRETED else ["native", "torch"])
def form(request, monkeypatch):
    """Every promise of an operation with several forms is of all that there are here."""
    if request.param == "native" and native.library("attention") is None:
        pytest.skip("no C++ compiler")
    if request.param != "native":
        monkeypatch.setattr(native, "library", lambda name: None)
    if request.param == "triton":
        monkeypatch.setattr(gpu, "serves", interpreter.serves)
    return request.param


@pytest.fixture
def interpreting(monkeypatch):
    """The Triton forms, where their interpreter runs; elsewhere nothing is changed."""
    if INTERPRETED:
        monkeypatch.setattr(native, "library", lambda name: None)
        monkeypatch.setattr(gpu, "serves", interpreter.serves)
    return INTERPRETED


if INTERPRETED:
    interpreter.mend()


@pytest.fixture(params=[1, 2])
def shared_out(request, monkeypatch):
    """That many threads, for work of any size."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "SMALL", 0)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
