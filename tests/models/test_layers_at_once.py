"""All layers of few tokens in one call: the bits of layer after layer, and when it must not run."""

import numpy as np
import pytest
import torch

from rlhf.kernels import decoder as kernel
from rlhf.kernels import native
from rlhf.kernels.attention import Plan
from rlhf.kernels.kv import as_bytes
from rlhf.models.attention import PagedContext
from rlhf.models.fused import StepForward
from rlhf.rollout.cache import KVPages

pytestmark = pytest.mark.skipif(native.library("decoder") is None, reason="no C++ compiler")

PAGE = 16
# new tokens of three sequences in each step, and copies of the last one: prompts, a chunk beside decoding, decoding, guesses
STEPS = [([5, 1, 20], 0), ([1, 14, 1], 2), ([1, 1, 1], 5), ([3, 1, 4], 0)]
WIDE = {"intermediate_size": 128, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def scramble(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1)


def run(forward, stored, steps=STEPS):
    """Logits of every step, and the bytes of the pages after the last one."""
    decoder = forward._decoder
    shapes = [(layer.kv_heads, layer.head_dim) for layer in decoder.layers]
    pages = KVPages(shapes, PAGE, stored or forward._model.dtype, torch.device("cpu"))
    pages.grow(12)
    table = np.random.default_rng(0).permutation(12).reshape(3, 4)
    lens, logits, generator = np.zeros(3, np.int64), [], torch.Generator().manual_seed(2)
    for counts, repeats in steps:
        positions = np.concatenate([start + np.arange(n) for start, n in zip(lens, counts)])
        owner = np.repeat(np.arange(3), counts)
        slots = table[owner, positions // PAGE] * PAGE + positions % PAGE
        ids = torch.randint(3, 25, (len(slots),), generator=generator)
        lens += counts
        starts = np.concatenate([[0], np.cumsum(counts)])
        ids, positions, slots = (
            torch.cat([x, x[-1:].repeat(repeats)])
            for x in (ids, torch.from_numpy(positions), torch.from_numpy(slots))
        )
        context = PagedContext(pages.k, pages.v, slots, table, lens.copy(), starts, pages.scales)
        logits.append(forward(ids, positions, context))
    return logits, [
        as_bytes(x).clone() for x in (*pages.k, *pages.v, *(s for p in pages.scales or () for s in p))
    ]


def both(forward, stored=None, steps=STEPS):
    """In one call, and layer after layer."""
    calls, native_layers = [], forward._decoder.native
    assert native_layers is not None
    plain_call = kernel.Layers.__call__

    def counted(self, *args):
        calls.append(1)
        return plain_call(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel.Layers, "__call__", counted)
        at_once = run(forward, stored, steps)
        forward._decoder.native = None
        one_by_one = run(forward, stored, steps)
        forward._decoder.native = native_layers
    assert len(calls) == len(steps)
    return at_once, one_by_one


def assert_same(at_once, one_by_one):
    for a, b in zip((*at_once[0], *at_once[1]), (*one_by_one[0], *one_by_one[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_it_has_the_bits_of_layer_after_layer(name, dtype, stored, prepared):
    """Would catch: a bias, a norm, a window or a residual left out, k written before it was rotated, what is repeated read from
    another token, and a rounding to bf16 that is missing or one too many."""
    model = prepared(name, dtype=dtype, config=WIDE)
    scramble(model)
    assert_same(*both(StepForward(model), stored))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_few_bits_too(bits, dtype, threads, prepared):
    """Would catch: scales of another weight, and groups of 4 bits as long as those of 8."""
    model, before = prepared("qwen2", dtype=dtype, config=WIDE), torch.get_num_threads()
    scramble(model)
    torch.set_num_threads(threads)
    try:
        forward = StepForward(model, bits)
        assert_same(*both(forward))
        torch.set_num_threads(threads + 1)
        assert not forward._decoder.native.takes(4, *a_plan_and_pages())
    finally:
        torch.set_num_threads(before)


def a_plan_and_pages():
    plan = Plan([1] * 4, [3] * 4, page_table=np.arange(4)[:, None], page_tokens=PAGE)
    return plan, torch.zeros(4, 2, PAGE, 16)


def test_pages_and_weights_that_moved_are_followed(prepared):
    """Would catch: keys written to memory that was given back when the cache grew, and old weights after an update."""
    forward = StepForward(prepared("qwen3", config=WIDE))
    first = run(forward, None)
    scramble(forward._model)
    forward.refresh()
    at_once, one_by_one = both(forward)
    assert_same(at_once, one_by_one)
    assert not torch.equal(at_once[0][-1], first[0][-1])


def test_what_it_does_not_serve_runs_layer_by_layer(prepared, monkeypatch):
    """Would catch: more rows than there is room for, and a machine without the compiled file that samples nothing."""
    model = prepared("llama", config=WIDE)
    forward = StepForward(model)
    plan, pages = a_plan_and_pages()
    layers = forward._decoder.native
    assert layers.takes(4, plan, pages) and layers.takes(kernel.MOST_TOKENS, plan, pages)
    for num_tokens, given, of in (
        (kernel.MOST_TOKENS + 1, plan, pages),
        (0, plan, pages),
        (4, Plan([4], [4]), pages),
        (4, plan, pages.double()),
        (4, plan, pages[:, :1]),
    ):
        assert not layers.takes(num_tokens, given, of)
    many = [([40, 9, 0], 0)]
    steps = [([c or 1 for c in counts], repeats) for counts, repeats in many]
    at_once = run(forward, None, steps)
    forward._decoder.native = None
    assert_same(at_once, run(forward, None, steps))
    monkeypatch.setattr(kernel.native, "library", lambda name: None)
    forward.refresh()
    assert forward._decoder.native is None
    odd = prepared("llama", config=WIDE | {"hidden_size": 40, "head_dim": 16})
    assert StepForward(odd)._decoder.native is None


def test_what_does_not_fit_is_refused(prepared):
    """Would catch: memory that is read or written beyond its end."""
    layers = StepForward(prepared("llama", config=WIDE))._decoder.native
    plan, pages = a_plan_and_pages()
    x, angles, rows = torch.zeros(4, 64), torch.zeros(4, 16), torch.zeros(8, dtype=torch.int64)
    count = len(layers._layers)
    kv = [pages.clone() for _ in range(count)], [pages.clone() for _ in range(count)]
    layers(x, angles, angles, plan, rows, *kv)
    for wrong, said in (
        ((x[:, :32].contiguous(), angles, angles, plan, rows), r"x \(4, 32\).*for layers of 64 numbers"),
        ((x, angles[:3], angles, plan, rows), r"cos \(3, 16\)"),
        ((x.double(), angles, angles, plan, rows), "must be torch.float32"),
        ((x, angles, angles, plan, rows[:7]), r"rows \(7,\) for 2 heads"),
        ((x[:3], angles[:3], angles[:3], plan, rows[:6]), "3 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            layers(*wrong, *kv)
    far = Plan([1] * 4, [3] * 4, page_table=np.full((4, 1), 4), page_tokens=PAGE)
    with pytest.raises(ValueError, match="the last of them number 4"):
        layers(x, angles, angles, far, rows, *kv)
