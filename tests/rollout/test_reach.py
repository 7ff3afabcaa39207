"""Models whose layers all have a window: pages behind it are given back, and nothing else changes."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers

from rlhf.models.attention import widest_window
from rlhf.models.swap import swap_modules
from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams
from rlhf.rollout.cache import PagePool
from rlhf.rollout.reach import Reach

PAGE = 16
VOCAB = 48
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


def prepare(config):
    """(prepared, stock with eager attention)."""
    torch.manual_seed(0)
    stock = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    prepared = copy.deepcopy(stock)
    prepared.set_attn_implementation("rlhf")
    swap_modules(prepared)
    return prepared, stock


@pytest.fixture(scope="module")
def windowed():
    """windowed(w): Mistral's layers of 1,024 positions with a window of w, the same weights for every w."""
    made = {}

    def get(window):
        if window not in made:
            config = transformers.MistralConfig(**SIZES, max_position_embeddings=1024, sliding_window=window)
            made[window] = prepare(config)[0]
        return made[window]

    return get


def make_engine(model, *, saving=True, **config):
    config = {
        "page_tokens": PAGE,
        "max_batch_tokens": 512,
        "max_sequences": 64,
        "prefix_cache": True,
    } | config
    engine = Engine(model, EngineConfig(**config))
    if not saving:  # as it would run a model that has one layer without a window
        engine._reach = Reach(None, PAGE)
        engine._begin_anew()
    return engine


def make_requests(lengths=(1, 16, 40, 129), *, n=2, **params):
    params = SamplingParams(**({"max_tokens": 70, "stop_ids": ()} | params))
    choose = np.random.default_rng(0)
    return [
        Request(f"r{i}", tuple(choose.integers(0, VOCAB, length).tolist()), params, tuple(key(0, "reach", i, j) for j in range(n)))
        for i, length in enumerate(lengths)
    ]  # fmt: skip


def check_nothing_held(engine):
    pool = engine._pool
    assert engine.pages_in_use == 0 and (pool.references == 0).all()
    assert sorted(pool.take(pool.num_pages)) == list(range(pool.num_pages))


@pytest.mark.parametrize("window", [1, 2, 9, 16, 17, 18, 33, 130])
def test_a_window_in_pages(window):
    """Would catch: a page given back that a query still sees, or held after the last one that does; against a slow count."""
    reach = Reach(window, PAGE)
    most = 0
    for position in range(1, 300):
        seen = {max(p, 0) // PAGE for p in range(position - max(window, 2) + 1, position)}
        assert reach.first_page(position) == min(seen)
        most = max(most, position // PAGE - min(seen) + 1)
        if position % PAGE == 0:
            assert position // PAGE - min(seen) == min(reach.pages_before, position // PAGE)
    assert most == reach.most_held == reach.least_pages(10_000)
    assert reach.longest(most - 1) == (most - 1) * PAGE and reach.longest(most) > 10**9
    assert Reach(None, PAGE).first_page(np.arange(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("window", [9, 33])
def test_a_long_response_needs_few_pages(windowed, window):
    """Would catch: pages kept behind the window, by a decoding sample or by a long prompt."""
    model = windowed(window)
    assert widest_window(model) == window
    bound = -(-window // PAGE) + 2
    for length, tokens in ((5, 350), (350, 20)):
        (request,) = make_requests([length], n=1, max_tokens=tokens, stop_ids=())
        whole = make_engine(model, saving=False, max_batch_tokens=32)
        small = make_engine(model, max_batch_tokens=32, cache_tokens=bound * PAGE)
        assert small.generate([request]) == whole.generate([request])
        assert small._pool.peak_in_use <= bound < 22 < whole._pool.peak_in_use
        assert small.stats["rollout/preempted"] == 0
        check_nothing_held(small)


@pytest.mark.parametrize("window", [2, 17, 64])
@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(max_batch_tokens=23),
        dict(cache_tokens=11 * PAGE, max_batch_tokens=64),
        dict(cache_tokens=11 * PAGE, max_batch_tokens=64, preemption="swap"),
        dict(prefix_cache=False, max_sequences=3),
        dict(draft_tokens=4, cache_tokens=480, cache_responses=True),
    ],
    ids=str,
)
def test_bits_are_those_of_an_engine_that_keeps_all_pages(windowed, window, config):
    """Would catch: a page given back too early, or lost in a fork, a swap, a guess, a preemption or a prefix hit."""
    model, requests = windowed(window), make_requests()
    expected = make_engine(model, saving=False).generate(requests)
    engine = make_engine(model, **config)
    assert engine.generate(requests) == expected
    if config.get("cache_tokens") == 11 * PAGE and window == 64:  # five pages each
        assert engine.stats["rollout/preempted"] > 0
    if not config:  # the cache is as large as the work
        assert engine.stats["rollout/preempted"] == 0
    assert engine.generate(requests[::-1]) == expected[::-1]
    check_nothing_held(engine)


def test_a_prefix_is_found_where_its_end_is_there(windowed):
    """Would catch: a hit whose queries see pages that were given to others, and none where all that is seen is there."""
    model = windowed(33)
    (first,) = make_requests([500], n=1, max_tokens=4)
    longer = dataclasses.replace(first, id="longer", prompt_ids=(*first.prompt_ids, 1, 2, 3))
    other = dataclasses.replace(first, id="other", prompt_ids=tuple(t ^ 1 for t in first.prompt_ids[:300]))
    expected = [make_engine(model, saving=False, prefix_cache=False).generate([r]) for r in (longer, other)]
    engine = make_engine(model, cache_tokens=36 * PAGE, max_batch_tokens=64)
    engine.generate([first])
    assert engine.generate([longer]) == expected[0]
    assert engine.stats["cache/hit_frac"] == pytest.approx(496 / 503)
    assert engine.generate([other]) == expected[1]
    assert engine.generate([longer]) == expected[0]  # of which the beginning was evicted by then
    assert engine.stats["cache/hit_frac"] == pytest.approx(496 / 503)
    kept = engine._pool
    assert len([d for d in kept._page_of]) < 500 // PAGE + 300 // PAGE


def test_the_end_of_a_prefix():
    """Would catch: a hit with a hole among the pages that are seen."""
    pool = PagePool(0)
    pool.grow(8)
    digests = [bytes([i]) for i in range(6)]
    pages = pool.take(6)
    pool.remember([pages[i] for i in (0, 1, 3, 4)], [digests[i] for i in (0, 1, 3, 4)])
    for count, found in ((1, (4, [4])), (2, (3, [3, 4])), (3, (0, [0, 1]))):
        assert pool.find_end(digests, count) == (found[0], [pages[i] for i in found[1]])
    assert pool.find_end(digests[:1], 3) == (0, pages[:1])
    assert pool.find_end(digests[2:3], 1) == (0, []) == pool.find_end([], 1)


def test_aborts_and_new_weights_behind_a_window(windowed):
    """Would catch: pages given back twice or never when work ends early or begins again."""
    model, requests = windowed(17), make_requests(n=2)
    engine = make_engine(model, max_batch_tokens=64, cache_tokens=480)
    expected = {r.id: c for r, c in zip(requests, make_engine(model).generate(requests), strict=True)}
    engine.add(requests)
    found, version = {}, 0
    for i in range(10_000):
        if not engine.has_work:
            break
        if i == 8:
            engine.abort("r3")
        if i in (20, 40):
            version += 1
            engine.set_version(version)
        for update in engine.step():
            found[update.request_id] = update.completions
    assert set(found) == {"r0", "r1", "r2"} and version == 2
    for name, completions in found.items():
        assert [c.logprobs for c in completions] == [c.logprobs for c in expected[name]]
    check_nothing_held(engine)


@pytest.fixture(scope="module")
def gpt_oss():
    """gpt_oss(layer types) -> (prepared, stock): sinks in every layer."""

    def make(*layer_types):
        config = transformers.GptOssConfig(
            **SIZES, max_position_embeddings=256, sliding_window=9, layer_types=list(layer_types),
            num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        prepared, stock = prepare(config)
        with torch.no_grad():  # as they are made, all sinks are alike
            for one, other in zip(prepared.model.layers, stock.model.layers, strict=True):
                sinks = torch.randn(4, generator=torch.Generator().manual_seed(0)) * 2
                one.self_attn.sinks.copy_(sinks)
                other.self_attn.sinks.copy_(sinks)
        return prepared, stock

    return make


@pytest.mark.parametrize("second", ["full_attention", "sliding_attention"])
def test_sinks_beside_windows(gpt_oss, second):
    """Would catch: sinks that the engine loses, or that count once for each piece of the keys."""
    model, stock = gpt_oss("sliding_attention", second)
    assert widest_window(model) == (None if second == "full_attention" else 9)
    engine = make_engine(model, max_batch_tokens=23)
    requests = make_requests([1, 16, 40], n=1, temperature=0.0, max_tokens=40, stop_ids=())
    for request, (completion,) in zip(requests, engine.generate(requests), strict=True):
        ids = torch.tensor([request.prompt_ids])
        with torch.no_grad():
            full = stock.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
            )
            logits = stock(full).logits[0, len(request.prompt_ids) - 1 : -1]
        assert completion.token_ids == tuple(full[0, len(request.prompt_ids) :].tolist())
        logprobs = torch.log_softmax(logits, -1).amax(-1)
        assert torch.allclose(torch.tensor(completion.logprobs), logprobs, atol=1e-4)
    alone = make_engine(model, saving=False).generate(requests)
    assert [c.token_ids for (c,) in alone] == [c.token_ids for (c,) in engine.generate(requests)]
    check_nothing_held(engine)
