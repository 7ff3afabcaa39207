"""What the GPU's checks share: tensors, comparisons with the torch forms in float64 and between bits, and times."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from rlhf.kernels import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest number
_FLUSH_BYTES = 256 << 20
_SHORT_MS = 0.2  # by events, below which a kernel may take less than 50 us
_IN_GRAPH, _REPLAYS = 20, 7


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    said: str


@dataclass(frozen=True)
class Timing:
    name: str
    shape: str
    ms: float
    share: float  # of the copy's bandwidth, or the product's rate
    goal: float | None
    against: str
    ratio: float | None  # its time by ours


def made(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


@contextlib.contextmanager
def torch_forms() -> Iterator[None]:
    """Within, no Triton form runs."""
    with mock.patch.object(gpu, "serves", lambda *tensors: False):
        yield


def close(
    name: str, run: Callable[..., torch.Tensor], *inputs: torch.Tensor, tolerance: float
) -> Iterator[Check]:
    """Values and gradients of `run` against its torch form in float64."""
    ours = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got = run(*ours)
    with torch_forms():
        want = run(*wide)
    grad = made(*want.shape, dtype=want.dtype, seed=9)
    found = torch.autograd.grad(got, ours, grad.to(got.dtype))
    with torch_forms():
        wanted = torch.autograd.grad(want, wide, grad.to(got.dtype).double())
    for label, a, b in zip(
        ["values", *(f"gradient {i}" for i in range(len(ours)))], [got, *found], [want, *wanted]
    ):
        a, b = a.detach().double(), b.detach()
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        yield Check(
            f"{name} {label}", error <= tolerance, f"{error:.1e} of the largest, {tolerance:.0e} allowed"
        )


def same(name: str, a: torch.Tensor, b: torch.Tensor) -> Check:
    different = int((a != b).sum())
    return Check(name, different == 0, f"{different} of {a.numel()} numbers differ")


def time_ms(run: Callable[[], Any], repetitions: int = 20) -> float:
    """Milliseconds of a call, the L2 cache written over before each: the median of what CUDA events say. Where that is short, the
    processor's part in a launch may be most of it: then the difference of two CUDA graphs' replays, one of flushes and
    calls by turns and one of as many flushes, by their number. What cannot be captured keeps the events' time."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    for _ in range(3):
        run()
    found = []
    for _ in range(repetitions):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    ms = statistics.median(found)
    return ms if ms > _SHORT_MS else min(ms, _graph_ms(run, flush) or ms)


def _graph_ms(run: Callable[[], Any], flush: torch.Tensor) -> float | None:
    """None where a call cannot be captured, as one that waits for the device."""
    try:
        both, alone = _captured(run, flush), _captured(lambda: None, flush)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    difference = statistics.median(_replay_ms(both) - _replay_ms(alone) for _ in range(_REPLAYS))
    return difference / _IN_GRAPH if difference > 0 else None


def _captured(run: Callable[[], Any], flush: torch.Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_IN_GRAPH):
            flush.zero_()
            run()
    graph.replay()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
