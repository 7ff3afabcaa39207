"""Layers whose weights are in host memory: the same numbers, two buffers, and no copy that is stale."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from rlhf.batching import PackedSequences
from rlhf.kernels.attention import Plan
from rlhf.models.attention import PackedContext, packed_attention
from rlhf.models.fused import StepForward
from rlhf.models.linear import InvariantLinear, weights_changed
from rlhf.models.offload import Arrival, home_of, offload_layers

LENGTHS = [25, 1, 40, 7]
LAYERS = 7


def make(prepared, name, **changes):
    """(with layers in host memory, plain), the same weights."""
    model = prepared(name, config={"num_hidden_layers": LAYERS}, **changes)
    return copy.deepcopy(model), model


def own_logits(model, pack: PackedSequences):
    with packed_attention(pack), torch.no_grad():
        output = model(input_ids=pack.token_ids[None], position_ids=pack.position_ids[None], use_cache=False)
    return output.logits[0]


def step_logits(forward, pack):
    return forward(pack.token_ids, pack.position_ids, PackedContext(Plan(LENGTHS, LENGTHS)))


@pytest.fixture
def read(monkeypatch):
    """Where weights lay when a product or a pack read them."""
    seen = []
    packed_weight = InvariantLinear.packed_weight

    def noted(self):
        seen.append(self.weight.data_ptr())
        return packed_weight(self)

    monkeypatch.setattr(InvariantLinear, "packed_weight", noted)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
def test_the_bits_are_those_of_the_whole_model(name, count, dtype, prepared, pack, read):
    """Would catch: another layer's weights, a buffer that is written while its layer runs, a layer that is run from host memory."""
    (model, plain), sequences = make(prepared, name, dtype=dtype), pack(LENGTHS)
    offload_layers(model, count, "cpu")
    homes = [home for layer in model.model.layers if (home := home_of(layer)) is not None]
    assert len(homes) == count and [home.index for home in homes] == list(range(count))
    host = homes[0].host
    forward, want = StepForward(model), own_logits(plain, sequences)
    assert forward.is_fused == (name != "gemma2")
    at_rest = {p: p.data_ptr() for p in host.parameters}
    for _ in range(3):
        assert torch.equal(step_logits(forward, sequences), want)
        assert torch.equal(own_logits(model, sequences), want)
        assert {p: p.data_ptr() for p in host.parameters} == at_rest
    buffers = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in host.buffers]
    assert not set(read) & set(at_rest.values())
    for first, end in buffers:
        assert any(first <= address < end for address in read)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))


def test_each_layer_is_copied_once_a_pass_and_before_its_turn(prepared, pack, monkeypatch):
    """Would catch: a copy that begins only when its layer runs, and layers copied twice."""
    (model, _), sequences = make(prepared, "qwen3"), pack(LENGTHS)
    offload_layers(model, 3, "cpu")
    host, events = home_of(model.model.layers[1]).host, []
    copy_, arrive = host._copy, host.arrive
    monkeypatch.setattr(host, "_copy", lambda i, at: (events.append(f"copy {i}"), copy_(i, at)))
    monkeypatch.setattr(host, "arrive", lambda i: (arrive(i), events.append(f"run {i}")))
    forward = StepForward(model)
    forward.refresh()
    events.clear()
    for _ in range(3):
        step_logits(forward, sequences)
    once = ["copy 1", "run 0", "copy 2", "run 1", "copy 0", "run 2"]
    assert events == ["copy 0", *once, *once, *once]


def test_new_weights_are_seen(prepared, pack):
    """Would catch: a layer that runs from a copy made before the weights were written."""
    (model, plain), sequences = make(prepared, "qwen3"), pack(LENGTHS)
    offload_layers(model, 3, "cpu")
    forward = StepForward(model)
    before = step_logits(forward, sequences)
    for of in (model, plain):  # as a load does it
        with torch.no_grad():
            for p in of.parameters():
                p.mul_(1.25)
    forward.refresh()
    assert torch.equal(step_logits(forward, sequences), own_logits(plain, sequences))
    assert torch.equal(own_logits(model, sequences), own_logits(plain, sequences))
    for of in (model, plain):  # as an optimiser does it: nothing tells of it
        for p in of.parameters():
            p.data.mul_(0.9)
        weights_changed(of)
    forward.forget()
    forward.refresh()
    after = step_logits(forward, sequences)
    assert torch.equal(after, own_logits(plain, sequences)) and not torch.equal(after, before)


def test_a_layer_that_fails_leaves_its_weights_at_home(prepared, pack, monkeypatch):
    """Would catch: parameters that point into a buffer which the next layer overwrites."""
    (model, plain), sequences = make(prepared, "llama"), pack(LENGTHS)
    offload_layers(model, 3, "cpu")
    forward = StepForward(model)

    def broken(*args, **kwargs):
        raise RuntimeError("no memory")

    for run in (lambda: step_logits(forward, sequences), lambda: own_logits(model, sequences)):
        with monkeypatch.context() as patch:
            patch.setattr(PackedContext, "attend", broken)
            with pytest.raises(RuntimeError, match="no memory"):
                run()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
    assert torch.equal(step_logits(forward, sequences), own_logits(plain, sequences))


def test_other_hooks_are_still_seen(prepared, pack):
    """Would catch: a hook of the user's on an offloaded layer that the fused forward passes over."""
    (model, _), sequences = make(prepared, "qwen3"), pack(LENGTHS)
    offload_layers(model, 3, "cpu")
    forward, calls = StepForward(model), []
    layer = next(m for m in model.model.layers if home_of(m))
    layer.register_forward_hook(lambda *args: calls.append(1))
    forward.refresh()
    assert not forward.is_fused
    step_logits(forward, sequences)
    assert calls and isinstance(next(iter(layer._forward_pre_hooks.values())), Arrival)


def test_what_is_refused(prepared):
    model, trained = make(prepared, "qwen3")
    for count in (2, 8):
        with pytest.raises(ValueError, match=f"offload_layers={count} is outside 3..7"):
            offload_layers(model, count, "cpu")
    trained.requires_grad_(True)
    with pytest.raises(ValueError, match="the model is trained"):
        offload_layers(trained, 3, "cpu")
    other = prepared("gpt_neox")
    other.get_decoder = lambda: nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has no list of layers"):
        offload_layers(other, 3, "cpu")
    offload_layers(model, 3, "cpu")
    with pytest.raises(ValueError, match="weights of 8 bits: .* that are on the device"):
        StepForward(model, 8)


class Event:
    """As CUDA's: what was asked of the copying stream before it was recorded is there once somebody waits for it."""

    def __init__(self):
        self.pending = []

    def record(self, stream):
        self.pending, stream.asked = stream.asked, []


class Stream:
    """Copies nothing before it must: what is read too early is NaN."""

    def __init__(self):
        self.asked, self.waited = [], []

    def wait_event(self, event):
        self.waited.append(event)
        for target, source in event.pending:
            target.detach().copy_(source)
        event.pending = []


def test_a_copy_that_comes_as_late_as_it_may(prepared, pack, monkeypatch):
    """Would catch: on a GPU, a layer that runs before its weights are there, and a copy into a buffer that is still read."""
    (model, plain), sequences = make(prepared, "qwen3"), pack(LENGTHS)
    offload_layers(model, 5, "cpu")
    host, copying, running = home_of(model.model.layers[0]).host, Stream(), Stream()
    host._copying, host._is_there, host._is_free = copying, [Event(), Event()], [Event(), Event()]
    freed = []
    for event in host._is_free:
        monkeypatch.setattr(event, "record", lambda stream, event=event: freed.append(event))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: running)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    copy_ = torch.Tensor.copy_

    def lazily(target, source, non_blocking=False):
        if not non_blocking:
            return copy_(target, source)
        at = next(i for i, b in enumerate(host.buffers) if b.data_ptr() == target.data_ptr())
        times_read, times_freed = running.waited.count(host._is_there[at]), freed.count(host._is_free[at])
        assert copying.waited[-1] is host._is_free[at] and times_read == times_freed, (
            "the buffer is still read"
        )
        copying.asked.append((target, source.clone()))
        return target.fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "copy_", lazily)
    forward, want = StepForward(model), own_logits(plain, sequences)
    assert forward.is_fused
    for _ in range(3):
        assert torch.equal(step_logits(forward, sequences), want)
        assert torch.equal(own_logits(model, sequences), want)
    assert len(freed) > 50
