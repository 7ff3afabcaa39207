"""Sections on one thread: what they leave behind."""

import pytest
import torch

from rlhf.kernels.threads import serial


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_work_has_one_thread_and_the_others_come_back(two_threads):
    """Would catch: a process that is left with one thread, by the end of a section or by an error in it."""
    with serial(1000):
        assert torch.get_num_threads() == 1
        with serial(1000):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="stop"), serial(1000):
        raise RuntimeError("stop")
    assert torch.get_num_threads() == 2


def test_large_work_keeps_its_threads(two_threads):
    """Would catch: training on one thread."""
    with serial(1 << 24):
        assert torch.get_num_threads() == 2
