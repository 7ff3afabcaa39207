"""Many requests with aborts, preemptions and new weights among them: none is lost, answered twice, or keeps a page.

RLHF_SOAK_REQUESTS=10000 asks for that many of each kind (some minutes each).
"""

import os
import random

import pytest
import torch

from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams

VOCAB = 48


def requests(count, choose):
    prefixes = [tuple(choose.randrange(VOCAB) for _ in range(32)) for _ in range(5)]
    for i in range(count):
        prompt = choose.choice([*prefixes, ()]) + tuple(
            choose.randrange(VOCAB) for _ in range(choose.randint(1, 20))
        )
        params = SamplingParams(
            max_tokens=choose.randint(1, 20),
            temperature=choose.choice([0.0, 0.7, 1.0]),
            top_k=choose.choice([0, 5]),
            top_p=choose.choice([1.0, 0.9]),
            stop_ids=choose.choice([(), (3, 4, 5)]),
            presence_penalty=choose.choice([0.0, 0.0, 0.0, 1.0]),
        )
        seeds = tuple(key(7, "soak", i, j) for j in range(choose.choice([1, 1, 1, 4])))
        yield Request(
            f"r{i}", prompt, params, seeds,
            priority=choose.randrange(3), tenant=choose.choice("abc"), stream=choose.random() < 0.2,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "policy", "preemption"),
    [
        ("qwen3", "fcfs", "swap"),
        ("qwen3", "fair", "recompute"),
        ("qwen3", "priority", "swap"),
        ("qwen3", "longest_first", "recompute"),
        ("mistral", "fcfs", "swap"),
    ],
)
def test_soak(fresh, architecture, policy, preemption):
    """Would catch: what only happens when everything happens at once."""
    choose, model = random.Random(0), fresh(architecture)
    config = EngineConfig(
        page_tokens=16,
        max_batch_tokens=96,
        max_sequences=24,
        prefix_cache=True,
        cache_tokens=400 if architecture == "qwen3" else 160,  # Mistral's window gives pages back
        policy=policy,
        preemption=preemption,
        cache_responses=policy == "fair",
    )
    engine = Engine(model, config)
    few = 1000 if architecture == "qwen3" else 300  # a small cache makes many passes
    count = int(os.environ.get("RLHF_SOAK_REQUESTS", few))
    coming = list(requests(count, choose))[::-1]
    asked = {r.id: r for r in coming}
    answered, aborted, streamed, version = {}, {}, {}, 0
    while coming or engine.has_work:
        room = 60 - engine.num_running - engine.num_waiting
        if coming and room > 0:
            engine.add([coming.pop() for _ in range(min(choose.randint(1, 8), len(coming)))])
        for update in engine.step():
            assert update.request_id not in answered and update.request_id not in aborted
            for delta in update.deltas:
                streamed.setdefault((update.request_id, delta.index), []).extend(delta.token_ids)
            if update.completions is not None:
                answered[update.request_id] = update.completions
        if choose.random() < 0.05:
            at_work = [n for n in asked if n not in answered and n not in aborted and n in engine._jobs]
            if at_work:
                name = choose.choice(at_work)
                aborted[name] = engine.abort(name)
        if choose.random() < 0.01:
            version += 1
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(choose.choice([0.9, 1.1]))
            engine.set_version(version)
    assert set(answered) | set(aborted) == set(asked) and not set(answered) & set(aborted)
    assert len(aborted) > 10 and version > 3
    assert engine._scheduler.num_preempted > (3 if architecture == "qwen3" else 0)
    for name, completions in answered.items():
        request = asked[name]
        assert [c.index for c in completions] == list(range(len(request.seeds)))
        for c in completions:
            assert 1 <= len(c.token_ids) <= request.params.max_tokens
            assert list(c.policy_versions) == sorted(c.policy_versions)
            is_stop = c.token_ids[-1] in request.params.stop_ids
            assert c.finish_reason == ("stop" if is_stop else "length")
            assert not set(c.token_ids[:-1]) & set(request.params.stop_ids)
            if request.stream:
                assert streamed[name, c.index] == list(c.token_ids)
    pool = engine._pool
    assert engine.pages_in_use == 0 and (pool.references == 0).all() and len(engine._samples) == 0
    assert engine._scheduler._pages_saved == 0
    assert sorted(pool.take(pool.num_pages)) == list(range(pool.num_pages))
