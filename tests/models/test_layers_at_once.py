"""All layers of few tokens in one call: the bits of layer after layer, and when it must not run."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.kernels import attention, native
from rlhf.kernels import decoder as kernel
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
@pytest.mark.parametrize("bits", [8, 4, None])
def test_weights_of_few_bits_too(bits, dtype, threads, prepared, monkeypatch):
    """Would catch: scales of another weight, and groups of 4 bits as long as those of 8, and
    threads that write each other's rows."""
    model, before = prepared("qwen2", dtype=dtype, config=WIDE), torch.get_num_threads()
    scramble(model)
    torch.set_num_threads(threads)
    monkeypatch.setattr(kernel.linear, "ALONE", 0)  # all is shared out
    monkeypatch.setattr(kernel.threads, "SMALL", 0)
    monkeypatch.setattr(attention, "_WORTH_THREADS", 0)
    try:
        forward = StepForward(model, bits)
        assert_same(*both(forward))
        torch.set_num_threads(threads + 1)
        plan, pages = a_plan_and_pages()
        assert not forward._decoder.native.takes(4, plan, pages.to(model.dtype))
        forward.refresh()
        assert forward._decoder.native.takes(4, plan, pages.to(model.dtype))
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


def narrow_mlp(model, layer, inner):
    """As one that was pruned."""
    mlp = model.model.layers[layer].mlp
    for linear, shape in (
        (mlp.gate_proj, (inner, 64)),
        (mlp.up_proj, (inner, 64)),
        (mlp.down_proj, (64, inner)),
    ):
        linear.weight = torch.nn.Parameter(linear.weight[: shape[0], : shape[1]].clone(), requires_grad=False)
        linear.out_features, linear.in_features = shape


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_of_different_sizes(layer, prepared):
    """Would catch: room for the first layer that a wider one writes beyond."""
    model = prepared("llama", config=WIDE | {"intermediate_size": 2048})
    narrow_mlp(model, layer, 48)
    assert_same(*both(StepForward(model)))


def test_a_cache_that_is_gone_is_not_kept(prepared):
    """Would catch: two caches in memory where one grows into another, or that of an engine that sleeps."""
    forward = StepForward(prepared("llama", config=WIDE))
    plan, pages = a_plan_and_pages()
    x, angles, rows = torch.zeros(4, 64), torch.zeros(4, 16), torch.arange(8)
    k, v = ([pages.clone() for _ in range(2)] for _ in "kv")
    layers = forward._decoder.native
    layers(x, angles, angles, plan, rows, k, v)
    kept, old = weakref.ref(k[0]), k[1].data
    k[1].data = torch.full_like(pages, 7.0)  # the same tensor in other memory
    layers(x + 1, angles + 1, angles, plan, rows, k, v)
    assert k[1].view(-1, 16)[rows].ne(7).any() and not old.any()
    del k, v
    assert kept() is None


def test_a_trial_that_differs_turns_it_off(prepared, monkeypatch):
    """Would catch: an engine whose log-probs are not the trainer's on a machine where the compiler went wrong."""
    plain_call = kernel.Layers.__call__
    monkeypatch.setattr(kernel.Layers, "__call__", lambda self, *given: plain_call(self, *given) + 1e-3)
    forward = StepForward(prepared("llama", config=WIDE))
    assert forward.is_fused and forward._decoder.native is None


def test_what_does_not_fit_is_refused(prepared):
    """Would catch: memory that is read or written beyond its end."""
    layers = StepForward(prepared("llama", config=WIDE))._decoder.native
    plan, pages = a_plan_and_pages()
    x, angles, rows = torch.zeros(4, 64), torch.zeros(4, 16), torch.arange(8)
    kv = [pages.clone() for _ in "01"], [pages.clone() for _ in "01"]
    layers(x, angles, angles, plan, rows, *kv)
    for wrong, said in (
        ((x[:, :32].contiguous(), angles, angles, plan, rows), r"x \(4, 32\).*for layers of 64 numbers"),
        ((x, angles[:3], angles, plan, rows), r"cos \(3, 16\)"),
        ((x.double(), angles, angles, plan, rows), "must be torch.float32"),
        ((x.to("meta"), angles, angles, plan, rows), "on the CPU"),
        ((x, angles, angles, plan, rows[:7]), r"rows \(7,\) torch.int64 for 2 heads"),
        ((x, angles, angles, plan, rows.int()), r"rows \(8,\) torch.int32 for 2 heads"),
        ((x, angles, angles, plan, rows[:1].expand(8)), r"rows \(8,\) torch.int64 for 2 heads"),
        ((x, angles, angles, plan, rows + 121), r"rows from 121 to 128 for pages \(4, 2, 16, 16\)"),
        ((x, angles, angles, plan, rows - 1), "rows from -1 to 6"),
        ((x[:3], angles[:3], angles[:3], plan, rows[:6]), "3 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            layers(*wrong, *kv)
    far = Plan([1] * 4, [3] * 4, page_table=np.full((4, 1), 4), page_tokens=PAGE)
    with pytest.raises(ValueError, match="the last of them number 4"):
        layers(x, angles, angles, far, rows, *kv)
    few, scales = pages.to(torch.int8), (torch.ones(4, 2, PAGE),) * 2
    for given, said in (
        ((kv[0][:1], kv[1]), "pages of 1 and 2 layers"),
        (([kv[0][0], pages[:0]], kv[1]), r"k_pages \(0, 2, 16, 16\) and v_pages \(4, 2, 16, 16\)"),
        (([pages, pages[:3].clone()], [pages, pages[:3].clone()]), "layer 1: .*beside"),
        (([few] * 2, [few] * 2), "need kv_scales"),
        (([few] * 2, [few] * 2, [scales, (torch.ones(1),) * 2]), r"kv_scales \(1,\)"),
        (([few] * 2, [few] * 2, [scales]), "and their scales if any, must be of 2"),
    ):
        with pytest.raises(ValueError, match=said):
            layers(x, angles, angles, plan, rows, *given)


def test_what_has_no_room_is_not_built(prepared):
    """Would catch: a bias or a norm that is read beyond its end, and heads for which attention.cpp has nothing."""
    held = StepForward(prepared("qwen3", config=WIDE))._decoder.native._held
    assert kernel.build(held, 4, 2, 16) is not None
    for sizes in ((5, 2, 16), (4, 2, 24), (8, 2, 16), (2 * 257, 2, 16)):
        assert kernel.build(held, *sizes) is None
    for change in (
        {"head_norms": held[1].head_norms[:5]},
        {"input_norm": torch.ones(48)},
        {"post_norm": held[1].post_norm.bfloat16()},
        {"out": (held[1].out[0], torch.zeros(48))},
        {"down": held[1].out},
    ):
        assert kernel.build([held[0], replace(held[1], **change)], 4, 2, 16) is None
