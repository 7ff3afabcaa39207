import pytest
import torch

from rlhf.kernels import native, threads


@pytest.fixture(params=["native", "torch"])
def form(request, monkeypatch):
    """Every promise of an operation with two forms is of both; where there is no compiler there is one."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda name: None)
    elif native.library("attention") is None:
        pytest.skip("no C++ compiler")
    return request.param


@pytest.fixture(params=[1, 2])
def shared_out(request, monkeypatch):
    """That many threads, for work of any size."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_SMALL", 0)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
