import copy
import dataclasses

import numpy as np
import pytest
import torch

from rlhf import faults
from rlhf.kernels.linear import row_bucket
from rlhf.kernels.logprob import token_logprobs
from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams

VOCAB, CONTEXT = 48, 96
PROMPTS = [
    (1,),
    (5, 6, 7),
    tuple(range(16)),
    tuple(range(2, 42)),
    (9,) * 17,
    (3, 1, 4, 1, 5, 9, 2, 6),
    (40, 41),
]
STOPS = (11, 23, 37)


def make_engine(model, **config):
    config = {"page_tokens": 16, "max_batch_tokens": 512, "max_sequences": 64, "prefix_cache": True} | config
    return Engine(model, EngineConfig(**config))


def make_requests(prompts=PROMPTS, *, n=1, seed=0, **params):
    params = SamplingParams(**({"max_tokens": 24} | params))
    return [
        Request(f"r{i}", tuple(p), params, tuple(key(seed, "test", i, j) for j in range(n)))
        for i, p in enumerate(prompts)
    ]


def flat(groups):
    return [c for group in groups for c in group]


@pytest.fixture(scope="module")
def expected(models):
    """Sampled completions of one roomy engine: what every other arrangement must reproduce bit for bit."""
    engine = make_engine(models("qwen3")[0])
    groups = engine.generate(make_requests(n=5, stop_ids=STOPS))
    assert engine.stats["rollout/preempted"] == 0
    reasons = {c.finish_reason for c in flat(groups)}
    assert reasons == {"stop", "length"}, "the workload must have both"
    return groups


# the same as transformers, the same as the trainer


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox"])
def test_greedy_equals_transformers_generate(models, name):
    # catches wrong positions, masks, sliding windows, softcaps or pages: they all change tokens
    model, stock = models(name)
    out = make_engine(model, max_batch_tokens=23).generate(make_requests(temperature=0.0, max_tokens=30))
    for prompt, (completion,) in zip(PROMPTS, out, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            full = stock.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False
            )
        assert completion.token_ids == tuple(full[0, len(prompt) :].tolist())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_full_forward_bit_for_bit(models, name, temperature):
    # catches any difference between what the sampler reports and what the trainer computes
    from rlhf.models.attention import packed_attention

    model, _ = models(name)
    params = dict(temperature=temperature, top_k=20, stop_ids=STOPS)
    groups = make_engine(model, max_batch_tokens=23).generate(make_requests(n=2, **params))
    for request, group in zip(make_requests(), groups, strict=True):
        for c in group:
            ids = torch.tensor([*request.prompt_ids, *c.token_ids])
            first = len(request.prompt_ids)
            with torch.no_grad(), packed_attention(pack_one(ids)):
                logits = model(
                    input_ids=ids[None], position_ids=torch.arange(len(ids))[None], use_cache=False
                ).logits
            logprobs, _ = token_logprobs(logits[0, first - 1 : -1], ids[first:], temperature)
            assert torch.equal(torch.tensor(c.logprobs), logprobs)
            assert all(p >= r - 1e-6 for p, r in zip(c.processed_logprobs, c.logprobs, strict=True))


def pack_one(ids):
    from rlhf.batching import PackedSequences

    none = torch.zeros(0, dtype=torch.int64)
    return PackedSequences(
        token_ids=ids,
        position_ids=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        target_index=none,
        source_index=none,
        rows=none,
        cols=none,
    )


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_rounded_cache_gives_the_same_in_every_batch(models, kv_dtype):
    # catches numbers without their scales after a fork, a preemption or in another chunk, and a cache that is not rounded
    model, params = models("qwen3")[0], dict(n=3, stop_ids=STOPS)
    roomy = make_engine(model, kv_dtype=kv_dtype).generate(make_requests(**params))
    for preemption in ("recompute", "swap"):
        tight = make_engine(
            model, kv_dtype=kv_dtype, max_batch_tokens=23, cache_tokens=96, preemption=preemption
        )
        assert tight.generate(make_requests(**params)) == roomy
        assert tight.stats["rollout/preempted"] > 0
    exact = make_engine(model).generate(make_requests(**params))
    both = [pair for pair in zip(flat(roomy), flat(exact)) if pair[0].token_ids == pair[1].token_ids]
    differences = [abs(a - b) for one, two in both for a, b in zip(one.logprobs, two.logprobs)]
    assert len(both) > 5 and 0 < np.mean(differences) < 0.15  # nats


def test_rounded_weights_give_the_same_in_every_batch(models):
    # catches rows of few bits that depend on the batch, and copies that are not made anew for new weights
    model = copy.deepcopy(models("qwen3")[0])
    params = dict(n=3, stop_ids=STOPS)
    engine = make_engine(model, weights="int8")
    roomy = engine.generate(make_requests(**params))
    tight = make_engine(model, weights="int8", max_batch_tokens=23, cache_tokens=96)
    assert tight.generate(make_requests(**params)) == roomy
    exact = flat(make_engine(model).generate(make_requests(**params)))
    assert [c.logprobs for c in exact] != [c.logprobs for c in flat(roomy)]
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.1)
    engine.set_version(1)
    anew = make_engine(model, weights="int8", max_batch_tokens=23).generate(make_requests(**params))
    assert [c.logprobs for c in flat(engine.generate(make_requests(**params)))] == [
        c.logprobs for c in flat(anew)
    ]


def test_samples_follow_the_policy(models):
    # catches keys used twice, a wrong position in the draw, or a fork that shares noise: 4,000 first tokens
    model, stock = models("qwen3")
    requests = make_requests([(5, 6, 7)], n=4000, max_tokens=2)
    (group,) = make_engine(model).generate(requests)
    with torch.no_grad():
        probs = torch.softmax(stock(torch.tensor([[5, 6, 7]])).logits[0, -1].double(), -1).numpy()
    observed = np.bincount([c.token_ids[0] for c in group], minlength=VOCAB)
    likely = 4000 * probs > 5
    chi_square = ((observed - 4000 * probs)[likely] ** 2 / (4000 * probs[likely])).sum()
    assert chi_square < likely.sum() + 4 * np.sqrt(2 * likely.sum())
    assert len({c.token_ids for c in group}) > 100


# nothing about the arrangement changes a result


@pytest.mark.parametrize(
    "config",
    [
        dict(page_tokens=32),
        dict(page_tokens=64),
        dict(page_tokens=256),
        dict(max_batch_tokens=7),
        dict(max_batch_tokens=64),
        dict(max_sequences=1),
        dict(max_sequences=3),
        dict(prefix_cache=False),
        dict(cache_tokens=64),
        dict(cache_tokens=144),
        dict(cache_tokens=144, prefix_cache=False, max_batch_tokens=11),
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_engines_sizes(models, expected, config):
    # catches page size, chunking, batch size, preemption or the prefix cache in a result
    engine = make_engine(models("qwen3")[0], **config)
    assert engine.generate(make_requests(n=5, stop_ids=STOPS)) == expected
    if config.get("cache_tokens"):
        assert engine.stats["rollout/preempted"] > 0
    assert engine._pool.num_in_use == 0


def test_min_p_of_one_leaves_the_likeliest(models):
    # catches a min_p that does not reach the draw
    engine = make_engine(models("qwen3")[0])
    tokens = [
        [c.token_ids for c in flat(engine.generate(make_requests(**params)))]
        for params in (dict(min_p=1.0), dict(temperature=0.0), dict(min_p=0.001))
    ]
    assert tokens[0] == tokens[1] != tokens[2]


def test_results_do_not_depend_on_the_batch(models, expected):
    # catches a row that sees its neighbours: alone, reversed, and among requests with other parameters
    model = models("qwen3")[0]
    requests = make_requests(n=5, stop_ids=STOPS)
    engine = make_engine(model)
    assert [engine.generate([r])[0] for r in requests] == expected
    assert engine.generate(requests[::-1]) == expected[::-1]
    others = [
        dataclasses.replace(
            r, id=f"other{i}", params=SamplingParams(max_tokens=9, temperature=t, top_k=k, top_p=p, min_p=m)
        )
        for i, (r, t, k, p, m) in enumerate(
            zip(requests, [0, 0.5, 1.0, 2.0], [0, 3, 5, 0], [1, 1, 0.5, 0.9], [0, 0.1, 0, 0.2], strict=False)
        )
    ]
    mixed = engine.generate([x for pair in zip(others, requests, strict=False) for x in pair])
    assert mixed[1::2] == expected[: len(others)]


def test_a_sample_does_not_depend_on_its_group(models, expected):
    # catches a fork whose samples share state: each sample alone, with its own seed
    engine = make_engine(models("qwen3")[0])
    for r, request in enumerate(make_requests(n=5, stop_ids=STOPS)[:3]):
        for i, seed in enumerate(request.seeds):
            ((alone,),) = engine.generate([dataclasses.replace(request, seeds=(seed,))])
            assert dataclasses.replace(alone, index=i) == expected[r][i]


# pages, versions, the prefix cache


def test_no_page_is_held_after_a_call(models):
    # catches leaks: without the prefix cache nothing stays, with it only pages that can be evicted
    for prefix_cache in (False, True):
        engine = make_engine(models("qwen3")[0], prefix_cache=prefix_cache)
        engine.generate(make_requests(n=3, stop_ids=STOPS))
        pool = engine._pool
        assert pool.num_in_use == 0 and (pool.references == 0).all()
        assert (pool.num_cached > 0) == prefix_cache
        assert sorted(pool.take(pool.num_pages)) == list(range(pool.num_pages))


def test_prefix_cache_is_used_again_and_changes_nothing(models):
    # catches a cache that never hits, or that returns another prompt's keys
    engine = make_engine(models("qwen3")[0])
    requests = make_requests(n=2)
    first = engine.generate(requests)
    assert engine.stats["cache/hit_frac"] == 0
    assert engine.generate(requests) == first
    assert engine.stats["cache/hit_frac"] > 0.5
    longer = dataclasses.replace(requests[3], prompt_ids=(*requests[3].prompt_ids, 1, 2, 3))
    out = engine.generate([longer])
    assert engine.stats["cache/hit_frac"] == pytest.approx(32 / 43)
    assert out == make_engine(models("qwen3")[0], prefix_cache=False).generate([longer])


def test_new_weights_are_used_at_once(fresh_model):
    # catches stale prefix pages or stale packed weights after an update, the classic silent off-policy bug
    engine = make_engine(fresh_model)
    requests = make_requests(n=2)
    before = engine.generate(requests)
    for p in fresh_model.parameters():
        p.data.mul_(1.1)  # as an optimiser does it: nothing about the tensor tells that it changed
    engine.set_version(1)
    after = engine.generate(requests)
    assert engine.stats["cache/hit_frac"] == 0
    assert [c.logprobs for c in flat(after)] != [c.logprobs for c in flat(before)]
    assert {v for c in flat(after) for v in c.policy_versions} == {1}
    assert {v for c in flat(before) for v in c.policy_versions} == {0}
    anew = Engine(copy.deepcopy(fresh_model), engine.config, version=1)  # a copy has no packed weights
    assert anew.generate(requests) == after


def test_a_version_that_comes_back_does_not_bring_its_pages_back(fresh_model):
    # catches a cache kept by version number alone: a resumed run counts from an older step with other weights
    engine = make_engine(fresh_model)
    requests = make_requests()
    engine.generate(requests)
    engine.set_version(1)
    with torch.no_grad():
        fresh_model.get_input_embeddings().weight.mul_(1.5)
    engine.set_version(0)
    out = engine.generate(requests)
    assert engine.stats["cache/hit_frac"] == 0
    assert out == make_engine(fresh_model).generate(requests)


def test_weights_may_not_change_during_a_call(models):
    engine = make_engine(models("qwen3")[0])
    with pytest.raises(RuntimeError, match="during generate"):
        engine.generate(make_requests(n=2), on_progress=lambda done, total: engine.set_version(1))
    assert engine.generate(make_requests([(1, 2)]))  # and the engine works on


def test_sleep_gives_the_memory_back_and_changes_nothing(models, expected):
    # catches results that need a cache that is gone
    engine = make_engine(models("qwen3")[0])
    requests = make_requests(n=5, stop_ids=STOPS)
    assert engine.generate(requests) == expected
    engine.sleep()
    assert engine._pages.num_pages == 0 and sum(t.numel() for t in engine._pages.k) == 0
    engine.wake()
    assert engine.generate(requests) == expected
    fixed = make_engine(models("qwen3")[0], cache_tokens=1024)
    fixed.sleep()
    fixed.wake()
    assert fixed._pages.num_pages == 64


def test_non_finite_weights_are_reported_and_leave_nothing_behind(fresh_model):
    # catches NaN that stays in a page and reaches the next sequences through 0 * NaN
    engine = make_engine(fresh_model, cache_tokens=2048)
    good = engine.generate(make_requests(n=3))
    weight = fresh_model.get_input_embeddings().weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    engine.set_version(1)
    bad = engine.generate(make_requests(n=3))
    assert all(np.isnan(c.logprobs).all() and all(0 <= t < VOCAB for t in c.token_ids) for c in flat(bad))
    with torch.no_grad():
        weight.copy_(saved)
    engine.set_version(0)
    assert engine.generate(make_requests(n=3)) == good


# how a response ends


def test_stop_and_length(models, expected):
    # catches a stop token that is dropped, a response that runs past it, or a wrong reason
    for c in flat(expected):
        assert not set(c.token_ids[:-1]) & set(STOPS)
        if c.finish_reason == "stop":
            assert c.token_ids[-1] in STOPS
        else:
            assert len(c.token_ids) == 24 and c.token_ids[-1] not in STOPS
        for field in (c.logprobs, c.processed_logprobs, c.policy_versions):
            assert len(field) == len(c.token_ids)


def test_a_stop_token_at_the_last_place_is_a_stop(models):
    # catches "length" for a response that did end by itself
    engine = make_engine(models("qwen3")[0])
    ((c,),) = engine.generate(make_requests([(5, 6, 7)], temperature=0.0, max_tokens=6))
    cut = c.token_ids.index(c.token_ids[3]) + 1
    ((again,),) = engine.generate(
        make_requests([(5, 6, 7)], temperature=0.0, max_tokens=cut, stop_ids=(c.token_ids[3],))
    )
    assert again.token_ids == c.token_ids[:cut] and again.finish_reason == "stop"


def test_min_tokens_holds_stop_tokens_back(models):
    # catches stop tokens drawn too early, or a ban that changes the policy's own log-probs
    engine = make_engine(models("qwen3")[0])
    out = flat(engine.generate(make_requests(n=6, stop_ids=STOPS, min_tokens=10)))
    assert all(len(c.token_ids) >= 10 for c in out) and any(10 < len(c.token_ids) < 24 for c in out)
    first = [(c.logprobs[0], c.processed_logprobs[0]) for c in out]
    assert all(p >= r for r, p in first) and any(p > r for r, p in first)
    assert all(r == p for c in out for r, p in zip(c.logprobs[10:], c.processed_logprobs[10:], strict=True))


def test_the_context_ends_a_response(models):
    # catches positions past the model's context
    prompt = tuple(i % VOCAB for i in range(CONTEXT - 3))
    ((c,),) = make_engine(models("qwen3")[0]).generate(make_requests([prompt], max_tokens=50))
    assert len(c.token_ids) == 3 and c.finish_reason == "length"


# bad requests, odds and ends


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(max_tokens=0), "max_tokens=0"),
        (dict(max_tokens=-1), "max_tokens=-1"),
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(min_p=-0.1), "min_p=-0.1"),
        (dict(min_p=1.1), "min_p=1.1"),
        (dict(min_tokens=25), "min_tokens=25"),
    ],
)
def test_bad_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**({"max_tokens": 24} | params))


def test_bad_requests_are_refused():
    params = SamplingParams(max_tokens=4)
    with pytest.raises(ValueError, match="'a' has an empty prompt"):
        Request("a", (), params, (1,))
    with pytest.raises(ValueError, match="'a' has no seeds"):
        Request("a", (1,), params, ())
    with pytest.raises(ValueError, match="-1 is not a 63-bit key"):
        Request("a", (1,), params, (-1,))


@pytest.mark.parametrize("name", ["page_tokens", "max_batch_tokens", "max_sequences"])
def test_bad_sizes_are_refused(models, name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        make_engine(models("qwen3")[0], **{name: 0})


def test_requests_that_cannot_run_are_refused(models):
    # before any work: the engine must be usable afterwards
    engine = make_engine(models("qwen3")[0], cache_tokens=32)
    params = SamplingParams(max_tokens=4)

    def request(name, prompt, params=params):
        return Request(name, tuple(prompt), params, (1,))

    with pytest.raises(ValueError, match="two requests have the id 'x'"):
        engine.generate([request("x", [1]), request("x", [2])])
    with pytest.raises(ValueError, match=f"'long': a prompt of {CONTEXT} tokens .* context of {CONTEXT}"):
        engine.generate([request("long", [1] * CONTEXT)])
    with pytest.raises(ValueError, match=f"'odd': token id {VOCAB} is outside"):
        engine.generate([request("odd", [1, VOCAB])])
    with pytest.raises(ValueError, match="'odd': token id -1 is outside"):
        engine.generate([request("odd", [1, -1])])
    with pytest.raises(
        ValueError, match="'big' needs up to 48 tokens of cache and there are 32; raise cache_tokens"
    ):
        engine.generate([request("big", [1] * 20, SamplingParams(max_tokens=20))])
    with pytest.raises(ValueError, match="page_tokens=24"):
        make_engine(models("qwen3")[0], page_tokens=24)
    assert len(engine.generate([request("ok", [1] * 20)])[0][0].token_ids) == 4


def test_no_requests_no_completions(models):
    engine = make_engine(models("qwen3")[0])
    assert engine.generate([]) == [] and engine.stats["rollout/forward_passes"] == 0


def test_results_come_in_the_order_asked(models, expected):
    for request, group in zip(make_requests(n=5), expected, strict=True):
        assert [(c.request_id, c.index) for c in group] == [(request.id, i) for i in range(5)]


def test_progress_is_told(models):
    calls = []
    make_engine(models("qwen3")[0]).generate(
        make_requests(n=3, stop_ids=STOPS), on_progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (21, 21) and all(total == 21 for _, total in calls)
    assert all(a[0] < b[0] for a, b in zip(calls, calls[1:], strict=False)) and len(calls) > 2


def test_a_fault_in_the_middle_leaves_a_working_engine(models, expected, monkeypatch):
    # catches an engine that is left half-way: pages lost, or half-written ones found again
    engine = make_engine(models("qwen3")[0])
    monkeypatch.setattr(faults, "_armed", [("rollout.mid", "*", "raise")])
    calls = []
    with pytest.raises(faults.InjectedFault):
        engine.generate(
            make_requests(n=5, stop_ids=STOPS), on_progress=lambda done, total: calls.append(done)
        )
    assert 0 < calls[-1] < 35
    assert engine._pool.num_in_use == 0
    assert engine.generate(make_requests(n=5, stop_ids=STOPS)) == expected


def test_the_models_training_mode_is_left_as_it_was(fresh_model):
    # catches dropout while sampling, and a trainer that finds its model in eval mode
    engine = make_engine(fresh_model)
    for mode in (True, False):
        fresh_model.train(mode)
        engine.generate(make_requests([(1, 2)]))
        assert fresh_model.training == mode


def test_the_engines_pages_hold_no_graph(fresh_model):
    # catches keys and values that keep the autograd graph of every step alive
    fresh_model.train()
    engine = make_engine(fresh_model)
    engine.generate(make_requests())
    assert not any(t.requires_grad for t in (*engine._pages.k, *engine._pages.v))


def test_rows_of_a_forward_fill_a_bucket(models):
    """Would catch: padding in every linear again, and a new kernel for each number of decoding samples."""
    model, _ = models("qwen3")
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        make_engine(model).generate(make_requests(n=7, max_tokens=6))
    finally:
        hook.remove()
    assert len(seen) > 3 and all(row_bucket(n) == n for n in seen)
