"""Log-probs of prompts: those that the same tokens would have had as a response."""

import dataclasses
import math
import random

import pytest
import torch

from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams

VOCAB = 48


def make_engine(model, **config):
    config = {"page_tokens": 16, "max_batch_tokens": 512, "max_sequences": 64, "prefix_cache": True} | config
    return Engine(model, EngineConfig(**config))


def make_requests(count=5, *, temperature=1.0, n=2, **params):
    choose = random.Random(0)
    return [
        Request(
            f"r{i}",
            tuple(choose.randrange(VOCAB) for _ in range(choose.randint(1, 40))),
            SamplingParams(max_tokens=12, temperature=temperature, **params),
            tuple(key(0, "scores", i, j) for j in range(n)),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("temperature", [0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_response_given_as_a_prompt_has_its_own_logprobs(models, fresh_model, dtype, temperature):
    """Would catch: log-probs of the token before or after, another temperature, and rounding of another order."""
    model = models("qwen3")[0] if dtype == torch.float32 else fresh_model.to(dtype)
    engine = make_engine(model)
    requests = make_requests(temperature=temperature)
    responses = [c for cs in engine.generate(requests) for c in cs]
    prompts = {r.id: r.prompt_ids for r in requests}
    whole = [
        Request(
            f"{c.request_id}.{c.index}",
            prompts[c.request_id] + c.token_ids,
            SamplingParams(max_tokens=1, temperature=temperature, prompt_logprobs=0),
            (1,),
        )
        for c in responses
    ]
    for response, (scored,) in zip(responses, engine.generate(whole), strict=True):
        assert scored.prompt.logprobs[-len(response.token_ids) :] == response.logprobs
        assert scored.prompt.top_logprobs == ()
        assert len(scored.prompt.logprobs) == len(prompts[response.request_id]) + len(response.token_ids) - 1


def test_scores_against_the_stock_model(models):
    """Would catch: logits of another row, and the likeliest tokens of another place."""
    model, stock = models("qwen3")
    requests = make_requests(prompt_logprobs=3)
    for request, completions in zip(requests, make_engine(model).generate(requests), strict=True):
        logprobs = stock(torch.tensor([request.prompt_ids])).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, torch.tensor(request.prompt_ids[1:])[:, None])[:, 0]
        likeliest = logprobs.topk(3, -1)
        for completion in completions:
            torch.testing.assert_close(torch.tensor(completion.prompt.logprobs), picked, atol=1e-4, rtol=1e-4)
            for place, top in enumerate(completion.prompt.top_logprobs):
                assert top.token_ids == tuple(likeliest.indices[place].tolist())
                assert top.logprobs == pytest.approx(likeliest.values[place].tolist(), abs=1e-4)
            assert len(completion.prompt.top_logprobs) == len(request.prompt_ids) - 1


@pytest.mark.parametrize(
    "config",
    [
        {"max_batch_tokens": 7},
        {"cache_tokens": 112, "prefix_cache": False},
        {"draft_tokens": 4, "max_sequences": 3},
    ],
)
def test_nothing_around_a_prompt_changes_its_scores(models, config):
    """Would catch: chunks, preemption, a cached prefix and guesses that leave a place out or shift it; and a response that
    is another because its prompt was scored."""
    plain = make_requests(8)
    scored = [dataclasses.replace(r, params=dataclasses.replace(r.params, prompt_logprobs=2)) for r in plain]
    engine = make_engine(models("qwen3")[0])
    expected = engine.generate(scored)
    assert [[dataclasses.replace(c, prompt=None) for c in cs] for cs in expected] == engine.generate(plain)
    again = make_engine(models("qwen3")[0], **config)
    again.generate(plain)  # the cache knows the prompts
    mixed = again.generate([r for pair in zip(scored, make_requests(8)) for r in (pair[0], renamed(pair[1]))])
    assert mixed[::2] == expected
    assert again.pages_in_use == 0
    assert all(not math.isnan(x) for cs in expected for c in cs for x in c.prompt.logprobs)


def renamed(request):
    return dataclasses.replace(request, id=f"also {request.id}")


def test_large_vocabularies_are_scored_piece_by_piece(models, monkeypatch):
    """Would catch: logits of a whole long prompt in memory at once, and pieces that do not join."""
    requests = make_requests(prompt_logprobs=1)
    expected = make_engine(models("qwen3")[0]).generate(requests)
    monkeypatch.setattr("rlhf.rollout.prompt_scores._MOST_LOGITS", 5 * VOCAB)
    monkeypatch.setattr("rlhf.rollout.prompt_scores._LEAST_ROWS", 1)
    engine, widest = make_engine(models("qwen3")[0]), 0
    run = engine._runner.run

    def counted(step, samples):
        nonlocal widest
        widest = max(widest, *(c.num_scored for c in step.chunks), 0)
        return run(step, samples)

    monkeypatch.setattr(engine._runner, "run", counted)
    assert engine.generate(requests) == expected and widest == 5


def test_a_stream_tells_the_prompt_once(models):
    """Would catch: scores that only a whole answer has, and those that come with every token."""
    requests = make_requests(prompt_logprobs=0)
    expected = make_engine(models("qwen3")[0]).generate(requests)
    engine, told = make_engine(models("qwen3")[0], max_batch_tokens=16), {}
    engine.add([dataclasses.replace(r, stream=True) for r in requests])
    while engine.has_work:
        for update in engine.step():
            for delta in update.deltas:
                told.setdefault((update.request_id, delta.index), []).append(delta.prompt)
    for completions in expected:
        for c in completions:
            first, *others = told[c.request_id, c.index]
            assert first == c.prompt and not any(others)


def test_what_is_refused():
    with pytest.raises(ValueError, match="prompt_logprobs=65 is outside 0..64"):
        SamplingParams(max_tokens=1, prompt_logprobs=65)
