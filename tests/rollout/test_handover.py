"""Prompts that one engine prefills and another goes on from: to the bit what one engine does alone."""

import copy
import dataclasses
import random

import peft
import pytest
import torch

from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, PagesError, Request, SamplingParams

VOCAB = 48
PAGE = 16
LENGTHS = (1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 5, 5 * PAGE)
KINDS = {"fp32": (torch.float32, "auto"), "bf16": (torch.bfloat16, "auto"), "int8": (torch.bfloat16, "int8")}
SIZES = {"page_tokens": PAGE, "max_batch_tokens": 512, "max_sequences": 64, "prefix_cache": True}


def make_engine(model, **config):
    version = config.pop("version", 0)
    return Engine(model, EngineConfig(**SIZES | config), version=version)


def make_requests(n=3, *, lengths=LENGTHS, beginning=0, name="r", **params):
    choose = random.Random(0)
    shared = [choose.randrange(VOCAB) for _ in range(beginning)]
    return [
        Request(
            f"{name}{i}",
            (*shared, *(choose.randrange(VOCAB) for _ in range(length))),
            SamplingParams(**{"max_tokens": 9, "stop_ids": (3,)} | params),
            tuple(key(0, name, i, j) for j in range(n)),
        )
        for i, length in enumerate(lengths)
    ]


def run_tokens(engine):
    """A list to which the engine's passes append how many tokens of prompts they run."""
    run, counts = type(engine._runner).run, []

    def counted(step, samples):
        counts.append(sum(chunk.end - chunk.start for chunk in step.chunks))
        return run(engine._runner, step, samples)

    engine._runner.run = counted
    return counts


def handed_over(requests, prefiller, decoder):
    return decoder.generate(requests, pages=prefiller.prefill(requests))


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_one_engine_does(models, fresh_model, kind, n):
    """Would catch: a position, a scale or a layer that is lost or moved, at the borders of pages too, in groups, and where
    prompts begin alike."""
    dtype, kv_dtype = KINDS[kind]
    model = models("qwen3")[0] if dtype == torch.float32 else fresh_model.to(dtype)
    requests = make_requests(n) + make_requests(n, lengths=(1, 5, 20), beginning=2 * PAGE + 3, name="s")
    expected = make_engine(model, kv_dtype=kv_dtype).generate(requests)
    prefiller, decoder = (make_engine(model, kv_dtype=kv_dtype) for _ in range(2))
    pages = prefiller.prefill(requests)
    assert prefiller.pages_in_use == 0
    for is_known in (False, True):
        ran = run_tokens(decoder)
        assert decoder.generate(requests, pages=pages) == expected
        assert sum(ran) == len(requests), "more than each prompt's last token was run again"
        assert decoder.pages_in_use == 0
        full = sum(p.num_tokens // PAGE * PAGE for p in pages)
        assert not is_known or decoder.counts["hit_tokens"] == full, "what came is not found again"
    again = prefiller.prefill(requests)
    assert [p.checksum for p in again] == [p.checksum for p in pages]
    assert prefiller.counts["hit_tokens"] > 0


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox"])
def test_other_architectures(models, name):
    """Would catch: layers whose keys are of another number or size, and a window that ends before what was handed over."""
    model, requests = models(name)[0], make_requests(2)
    expected = make_engine(model).generate(requests)
    assert handed_over(requests, make_engine(model), make_engine(model)) == expected


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"page_tokens": 32}, {}),
        ({}, {"page_tokens": 64}),
        ({"max_batch_tokens": 7}, {"max_batch_tokens": 5}),
        ({"prefix_cache": False}, {"prefix_cache": False}),
        ({"cache_tokens": 96}, {"cache_tokens": 96}),
        ({"cache_tokens": 112, "preemption": "swap"}, {}),
        ({}, {"max_sequences": 2}),
        ({"draft_tokens": 3}, {}),
    ],
    ids=str,
)
def test_sizes_of_the_two_engines_change_nothing(models, ours, theirs):
    """Would catch: pages laid out by the other engine's size, a batch cut in the middle, and samples that gave way going on
    from what is no longer there."""
    model, requests = models("qwen3")[0], make_requests(4, max_tokens=16)
    expected = make_engine(model).generate(requests)
    prefiller, decoder = make_engine(model, **theirs), make_engine(model, **ours)
    assert handed_over(requests, prefiller, decoder) == expected
    assert "cache_tokens" not in ours or decoder.counts["preempted"] > 0


def test_everything_that_a_request_may_want(models):
    """Would catch: log-probs of prompts that are lost, of one token, or of another temperature; wishes that only the engine
    that prefills hears of; samples that go on from what an earlier call wrote."""
    model = models("qwen3")[0]
    requests = [
        *make_requests(2, prompt_logprobs=3, temperature=0.7),
        *make_requests(2, name="g", temperature=0.0, prompt_logprobs=0, top_logprobs=2),
        *make_requests(2, name="m", min_tokens=4, repetition_penalty=1.3, banned_ids=(5, 6)),
    ]
    engine = make_engine(model)
    expected = engine.generate(requests)
    assert handed_over(requests, make_engine(model), make_engine(model)) == expected
    cut = make_engine(model).generate(requests, enough=1)
    assert any(c.finish_reason == "aborted" and c.token_ids for cs in cut for c in cs)
    rest = [dataclasses.replace(r, begun=tuple(cs)) for r, cs in zip(requests, cut, strict=True)]
    assert handed_over(rest, make_engine(model), make_engine(model)) == make_engine(model).generate(rest)


def save_adapter(model, folder, seed):
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False
    )
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)


def test_adapters(models, tmp_path):
    """Would catch: keys of the model without the adapter, and of another adapter under the same name."""
    model = models("qwen3")[0]
    alone, prefiller, decoder = engines = [make_engine(model) for _ in range(3)]
    for i, name in enumerate("ab"):
        save_adapter(model, tmp_path / name, i)
        for engine in engines:
            engine.add_adapter(name, tmp_path / name)
    requests = [
        dataclasses.replace(r, id=r.id + adapter, adapter=adapter)
        for r in make_requests(2)
        for adapter in ("", "a", "b")
    ]
    expected = alone.generate(requests)
    assert handed_over(requests, prefiller, decoder) == expected
    pages = prefiller.prefill(requests[1:2])
    decoder.remove_adapter("a")
    with pytest.raises(ValueError, match="adapter 'a' is unknown"):
        decoder.generate(requests[1:2], pages=pages)
    decoder.add_adapter("a", tmp_path / "b")
    with pytest.raises(
        PagesError, match=r"'r0a': pages of adapter weights with checksum \d+ in an engine of"
    ):
        decoder.generate(requests[1:2], pages=pages)


def test_aborted_between_prefill_and_decoding(models):
    """Would catch: pages of a prompt that nobody waits for any more, before it was admitted and after."""
    model, requests = models("qwen3")[0], make_requests(3)
    prefiller, decoder = make_engine(model), make_engine(model, max_sequences=8)
    pages = prefiller.prefill(requests)
    decoder.add(requests, pages=pages)
    decoder.abort("r7")
    for _ in range(2):
        decoder.step()
    assert decoder.num_waiting and decoder.num_running
    for request in requests[:-1]:
        if request.id in decoder._jobs:
            decoder.abort(request.id)
    assert decoder.pages_in_use == prefiller.pages_in_use == 0 and not decoder.has_work
    assert decoder.generate(requests, pages=pages) == make_engine(model).generate(requests)


def test_weights_that_move_while_a_prompt_waits(fresh_model):
    """Would catch: tokens drawn from keys of earlier weights, and log-probs of the prompt under those."""
    model, requests = fresh_model, make_requests(2, lengths=(20, 40, 17), prompt_logprobs=0)
    alone, prefiller, decoder = (make_engine(model, max_sequences=2) for _ in range(3))
    pages = prefiller.prefill(requests)
    alone.add(requests)
    decoder.add(requests, pages=pages)
    for engine in (alone, decoder):  # only the first request has begun
        engine.step()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    found = []
    for engine in (alone, decoder):
        engine.set_version(1)
        found.append([])
        while engine.has_work:
            found[-1] += [u.completions for u in engine.step() if u.completions is not None]
    assert found[0] == found[1]
    assert {v for cs in found[0] for c in cs for v in c.policy_versions} == {0, 1}
    with pytest.raises(PagesError, match="'r0': pages of weight version 0 in an engine of weight version 1"):
        decoder.add(requests, pages=pages)
    assert not decoder.has_work
    assert handed_over(requests, make_engine(model, version=1), decoder) == alone.generate(requests)


def test_what_is_refused(models):
    """Would catch: samples drawn from keys of something else."""
    model, requests = models("qwen3")[0], make_requests(1, lengths=(20, 20))
    prefiller, decoder = make_engine(model), make_engine(model)
    pages = prefiller.prefill(requests)
    for given, message in (
        (pages[:1], "pages for 1 requests, there are 2"),
        (pages[::-1], "'r0' has a prompt of 20 tokens, and its pages are of another one of 20"),
        ([dataclasses.replace(pages[0], data=pages[0].data + 1), None], "'r0': its pages have checksum"),
    ):
        with pytest.raises(PagesError, match=message):
            decoder.add(requests, pages=given)
    for other, message in (
        (
            make_engine(models("llama")[0], kv_dtype="int8"),
            "cache numbers torch.float32 in an engine of cache numbers torch.int8",
        ),
        (
            make_engine(models("gpt_neox")[0]),
            r"by layer \(\(2, 8\), \(2, 8\)\) in an engine of .*\(\(4, 8\), \(4, 8\)\)",
        ),
        (
            make_engine(model, weights="int8"),
            "weights in the form 'auto' in an engine of weights in the form 'int8'",
        ),
        (make_engine(model, version=3), "weight version 0 in an engine of weight version 3"),
    ):
        with pytest.raises(PagesError, match=message):
            other.generate(requests, pages=pages)
    scored = make_requests(1, lengths=(20, 20), prompt_logprobs=2)
    with pytest.raises(
        PagesError, match="wants log-probs of its prompt with 2 likeliest tokens at temperature 1, .* None"
    ):
        decoder.generate(scored, pages=pages)
    warmer = [dataclasses.replace(r, params=dataclasses.replace(r.params, temperature=2.0)) for r in scored]
    with pytest.raises(PagesError, match=r"at temperature 2, and its pages came with \(2, 1.0\)"):
        decoder.generate(warmer, pages=prefiller.prefill(scored))
    assert decoder.generate(requests, pages=[None, pages[1]]) == make_engine(model).generate(requests)
    prefiller.add(requests)
    with pytest.raises(RuntimeError, match="prefill with 2 requests in work"):
        prefiller.prefill(requests)


def test_models_of_windows_alone_are_refused(models):
    """Would catch: pages of a prompt's beginning that hold other tokens' keys, for the next prompt that begins so."""
    model, requests = models("mistral")[0], make_requests(1, lengths=(20,))
    with pytest.raises(ValueError, match="every layer of Mistral.* has a window.*let one engine"):
        make_engine(model).prefill(requests)
    pages = make_engine(models("llama")[0]).prefill(requests)
    with pytest.raises(ValueError, match="every layer of Mistral"):
        make_engine(model).generate(requests, pages=pages)
