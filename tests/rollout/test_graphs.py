"""Recorded decoding steps: the samples of an engine that launches one by one. A stand-in for a CUDA graph records every torch
operation and every kernel's launch with its arguments, and runs exactly these again: what Python would do differently in a
later step is not done. Run in Triton's interpreter by tests/kernels/test_triton.py."""

import copy
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.gpu import interpreter
from rlhf.kernels import gpu, native, sampling
from rlhf.kernels import linear as linear_kernel
from rlhf.kernels.logprob import token_logprobs
from rlhf.models import fused
from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams
from rlhf.rollout import graphs as graphs_file
from rlhf.rollout import runner as runner_file

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="of the Triton forms; tests/kernels/test_triton.py runs it"
)
CONFIG = EngineConfig(page_tokens=16, max_batch_tokens=64, max_sequences=8, prefix_cache=True)


class Recording(TorchDispatchMode):
    """What a CUDA graph would hold: operations and launches on tensors, without the Python between them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert operation is not torch.ops.aten._local_scalar_dense.default, (
            "a number was read: it waits for the device"
        )
        out = operation(*args, **kwargs)
        self.calls.append((operation, args, kwargs, out))
        return out

    def launched(self, kernel, grid, first, *args, **options):
        def again(*_args, **_kwargs):
            with _disable_current_modes():
                kernel[grid](first, *args, **options)

        again()
        self.calls.append((again, (), {}, None))

    def replay(self):
        for operation, args, kwargs, out in self.calls:
            found = operation(*args, **kwargs)
            for to, new in zip(tensors(out), tensors(found), strict=True):
                if to.data_ptr() != new.data_ptr():  # neither a view nor in place
                    to.copy_(new)


def tensors(x):
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in tensors(y)] if isinstance(x, tuple | list) else []


@pytest.fixture
def recorded(monkeypatch):
    """As on a GPU; the list has an entry for each replay."""
    replays = []

    def record(compute):
        recording = Recording()
        modules = [
            m for name, m in sys.modules.items() if name.startswith("rlhf.kernels.") and hasattr(m, "launch")
        ]
        with pytest.MonkeyPatch.context() as patch:
            for module in modules:
                patch.setattr(module, "launch", recording.launched)
            with recording:
                out = compute()

        def replay():
            replays.append(len(recording.calls))
            recording.replay()
            return out

        return replay

    monkeypatch.setattr(native, "library", lambda name: None)
    monkeypatch.setattr(native, "PLAIN", ())  # nothing by numpy, which would not be recorded
    monkeypatch.setattr(gpu, "serves", interpreter.serves)
    monkeypatch.setattr(linear_kernel, "can_pack", lambda weight: False)
    monkeypatch.setattr(sampling, "_check", lambda *given: None)  # on a CPU it reads the numbers
    monkeypatch.setattr(sampling, "_policy_logprobs", lambda *given: token_logprobs(*given)[0])
    monkeypatch.setattr(runner_file, "Recorder", lambda device: record)
    monkeypatch.setattr(graphs_file, "_AFTER", 0)
    monkeypatch.setattr(fused, "_TRIAL_TOKENS", (7,))
    return replays


def requests(lengths=((5, 3), (20, 5), (15, 4)), samples=1, **params):
    generator = np.random.default_rng(1)
    return [
        Request(
            id=f"r{i}",
            prompt_ids=tuple(generator.integers(0, 48, n).tolist()),
            params=SamplingParams(max_tokens=most, **params),
            seeds=tuple(key(0, "t", i, s) for s in range(samples)),
        )
        for i, (n, most) in enumerate(lengths)
    ]


def compare(model, asked, recorded, config=CONFIG, between=None):
    """Of an engine that records and one that does not: the same, and steps were run again."""
    found = []
    for cuda_graphs in (True, False):
        own = model if between is None else copy.deepcopy(model)
        engine = Engine(own, replace(config, cuda_graphs=cuda_graphs))
        out = engine.generate(asked)
        if between is not None:
            between(engine)
            out += engine.generate(asked)
        found.append(out)
        assert recorded, "nothing was recorded"
        count = len(recorded)
        assert engine.pages_in_use == 0
    assert len(recorded) == count
    assert found[0] == found[1]
    return count


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_the_samples_are_those_of_steps_launched_one_by_one(name, models, recorded):
    """Would catch: a position, a page, a length or a draw of the step that was recorded, copies of the last row that are written
    elsewhere, and a window's work for which there is no room."""
    compare(models(name)[0], requests(), recorded)


def test_cuts_and_temperatures_are_those_of_the_step(models, recorded):
    """Would catch: top-k of the rows that were recorded, and a graph without cuts for rows that have some."""
    asked = requests(((4, 3), (7, 3)))
    asked[0] = replace(asked[0], params=SamplingParams(max_tokens=3, temperature=0.7, top_k=3))
    asked[1] = replace(asked[1], params=SamplingParams(max_tokens=3, temperature=1.3, top_p=0.8, min_p=0.02))
    asked.append(
        replace(requests(((3, 3),))[0], id="greedy", params=SamplingParams(max_tokens=3, temperature=0.0))
    )
    compare(models("qwen3")[0], asked, recorded)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_pages_of_two_segments(name, models, recorded, monkeypatch):
    """Would catch: parts of a context that are joined in another number than were worked on, and a window over two of them."""
    from rlhf.kernels import attention_triton

    monkeypatch.setattr(attention_triton, "SEGMENT", 64)
    compare(models(name)[0], requests(((63, 4), (9, 3))), recorded)


def test_new_weights_and_a_cache_elsewhere_are_recorded_anew(models, recorded):
    """Would catch: a graph that reads memory which was given back."""

    def update(engine):
        engine.sleep()
        for p in engine.model.parameters():
            p.data = p.data * 1.5
        engine.set_version(1)

    compare(models("qwen3")[0], requests(((5, 3),)), recorded, between=update)


def test_a_step_that_cannot_be_recorded_runs_launch_by_launch(models, recorded, monkeypatch):
    """Would catch: an engine that stops where a driver refuses to record."""

    def refuse(compute):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(runner_file, "Recorder", lambda device: refuse)
    asked = requests(((5, 3),))
    with pytest.warns(UserWarning, match="1 rows could not be recorded as a CUDA graph.*not permitted"):
        got = Engine(models("qwen3")[0], CONFIG).generate(asked)
    assert got == Engine(models("qwen3")[0], replace(CONFIG, cuda_graphs=False)).generate(asked)
    assert not recorded


def test_what_a_graph_cannot_do_runs_launch_by_launch(models, recorded):
    """Would catch: bans, penalties and adapters that a recorded step leaves out."""
    asked = requests(((5, 3),), stop_ids=(1, 2, 3), min_tokens=3)
    asked.append(
        replace(requests(((4, 3),))[0], id="p", params=SamplingParams(max_tokens=3, presence_penalty=1.0))
    )
    engine = Engine(models("qwen3")[0], CONFIG)
    got = engine.generate(asked)
    assert not recorded
    assert got == Engine(models("qwen3")[0], replace(CONFIG, cuda_graphs=False)).generate(asked)
