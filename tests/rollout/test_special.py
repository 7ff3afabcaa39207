"""What a request may ask of its draws: each against a slow reference that draws token by token from the whole model."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Grammar, Request, SamplingParams
from rlhf.rollout.grammar import GrammarError
from rlhf.rollout.processors import processed

VOCAB = 48
PROMPT = (5, 6, 7, 6, 5)
SIZES = dict(page_tokens=16, max_batch_tokens=512, max_sequences=64, prefix_cache=True)
LETTERS = ["<eos>", *'{}[]":, 0123456789abcdefghijklmnopqrstuvwxyz']


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character, 48 in all; byte level, so that any text can be written as bytes."""
    letters = LETTERS + ["Ġ", "Ċ"]
    letters = list(dict.fromkeys(letters))[:VOCAB]
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def ask(model, *requests, tokenizer=None):
    return [
        c
        for group in Engine(model, EngineConfig(**SIZES), tokenizer=tokenizer).generate(requests)
        for c in group
    ]


def request(name="r", n=3, **params):
    params = SamplingParams(**({"max_tokens": 20} | params))
    return Request(name, PROMPT, params, tuple(key(0, "special", i) for i in range(n)))


def slow(logits, params, prompt, response):
    """`processed`, from its definition, token by token in Python."""
    out = []
    for token, z in enumerate(logits.double().tolist()):
        if params.allowed_ids is not None and token not in params.allowed_ids:
            z = -math.inf
        if token in params.banned_ids:
            z = -math.inf
        z += sum(bias for other, bias in params.logit_bias if other == token)
        if token in prompt or token in response:
            z = z / params.repetition_penalty if z > 0 else z * params.repetition_penalty
        count = list(response).count(token)
        out.append(z - params.frequency_penalty * count - params.presence_penalty * (count > 0))
    return torch.tensor(out, dtype=torch.float64)


WISHES = [
    dict(repetition_penalty=1.7),
    dict(repetition_penalty=0.6),
    dict(presence_penalty=1.5),
    dict(frequency_penalty=0.8, presence_penalty=-0.5),
    dict(logit_bias=((3, 4.0), (9, -2.5), (3, 1.0), (4, -math.inf))),
    dict(allowed_ids=(1, 2, 30), banned_ids=(2,)),
    dict(
        repetition_penalty=1.2,
        frequency_penalty=1.0,
        logit_bias=((1, 2.0),),
        banned_ids=(7, 8),
        temperature=0.7,
    ),
]


@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_processed_logits(wishes):
    """Would catch: penalties with the wrong sign, of the wrong tokens, or counted once for each time they are read."""
    params = SamplingParams(max_tokens=5, **wishes)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    kept = logits.clone()
    prompt, response = np.asarray(PROMPT), np.asarray([1, 9, 9, 30, 1, 9])
    for done in (response, response[:0]):
        got = processed(logits, params, prompt, done)
        torch.testing.assert_close(
            got.double(), slow(logits, params, prompt.tolist(), done.tolist()), rtol=1e-6, atol=1e-6
        )
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("wishes", WISHES, ids=str)
@pytest.mark.parametrize("greedy", [False, True])
def test_draws_and_both_logprobs(models, wishes, greedy):
    """Would catch: wishes that reach another row, the policy's own log-probs changed by them, and processed ones that
    are not of what was drawn from."""
    model, stock = models("qwen3")
    wishes = wishes | ({"temperature": 0.0} if greedy else {})
    asked = request(**wishes)
    plain = request("plain")
    mixed = ask(model, plain, asked)
    assert mixed[:3] == ask(model, plain) and mixed[3:] == ask(model, asked)
    params = asked.params
    at = params.temperature or 1.0
    for c in mixed[3:]:
        for i, token in enumerate(c.token_ids):
            with torch.no_grad():
                logits = stock(torch.tensor([[*PROMPT, *c.token_ids[:i]]])).logits[0, -1]
            changed = slow(logits, params, PROMPT, c.token_ids[:i])
            assert c.logprobs[i] == pytest.approx(
                float(torch.log_softmax(logits.double() / at, -1)[token]), abs=1e-4
            )
            if greedy:
                assert changed[token] >= changed.max() - 1e-4 and c.processed_logprobs[i] == 0
            else:
                want = float(torch.log_softmax(changed / at, -1)[token])
                assert c.processed_logprobs[i] == pytest.approx(want, abs=1e-4)


def test_top_logprobs(models):
    """Would catch: likeliest tokens of another row or place, and processed ones without the cuts."""
    model, stock = models("qwen3")
    wishes = dict(top_logprobs=5, top_k=3, banned_ids=(1, 2), temperature=0.8)
    for c in ask(model, request(**wishes), request("other")):
        assert len(c.top_logprobs) == (len(c.token_ids) if c.request_id == "r" else 0)
        for i, top in enumerate(c.top_logprobs):
            with torch.no_grad():
                logits = stock(torch.tensor([[*PROMPT, *c.token_ids[:i]]])).logits[0, -1] / 0.8
            values, ids = torch.log_softmax(logits, -1).topk(5)
            assert top.token_ids == tuple(ids.tolist())
            torch.testing.assert_close(torch.tensor(top.logprobs), values, atol=1e-4, rtol=0)
            logits[[1, 2]] = -math.inf
            values, ids = logits.topk(3)
            assert top.processed_ids == tuple(ids.tolist())
            torch.testing.assert_close(
                torch.tensor(top.processed_logprobs), torch.log_softmax(values, -1), atol=1e-4, rtol=0
            )


def test_a_stop_text_ends_with_the_token_that_completes_it(models, tokenizer):
    """Would catch: a text found late, across tokens not at all, or before min_tokens."""
    model, _ = models("qwen3")
    whole = ask(model, request(), tokenizer=tokenizer)
    text = tokenizer.decode(whole[0].token_ids)
    stop = text[4:7]
    first = text.index(stop)
    (c, *_) = ask(model, request(stop=("never", stop)), tokenizer=tokenizer)
    assert c.finish_reason == "stop" and tokenizer.decode(c.token_ids) == text[: first + 3]
    (c, *_) = ask(model, request(stop=(stop,), min_tokens=first + 4), tokenizer=tokenizer)
    assert len(c.token_ids) >= first + 4
    assert c.finish_reason == "length" or tokenizer.decode(c.token_ids).endswith(
        stop
    )  # one found before does not count
    with pytest.raises(ValueError, match="'r' has stop texts, which need a tokenizer"):
        ask(model, request(stop=("x",)))


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def test_structured_output(models, tokenizer):
    """Would catch: a mask one token late, shared between samples, or that lets a text end too early."""
    pytest.importorskip("llguidance")
    model, _ = models("qwen3")
    grammar = Grammar("json_schema", json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}}))
    asked = request(grammar=grammar, max_tokens=60, n=6)
    plain = request("plain")
    out = ask(model, asked, plain, tokenizer=tokenizer)
    done = [c for c in out[:6] if c.finish_reason == "stop"]
    assert done and out[6:] == ask(model, plain)
    for c in done:
        value = json.loads(tokenizer.decode(c.token_ids, skip_special_tokens=True))
        assert set(value) == {"a", "b"} and isinstance(value["a"], int) and value["b"] in "xy"
    for c in ask(model, request(grammar=Grammar("regex", "[ab]{3}(c|dd)")), tokenizer=tokenizer):
        text = tokenizer.decode(c.token_ids, skip_special_tokens=True)
        assert len(text) in (4, 5) and set(text[:3]) <= set("ab") and text[3:] in ("c", "dd")
    (c, *_) = ask(
        model, request(grammar=Grammar("lark", 'start: "1" "2"+ ";"?'), max_tokens=4), tokenizer=tokenizer
    )
    assert tokenizer.decode(c.token_ids)[:2] == "12"


def test_an_aborted_sample_goes_on_within_its_grammar(models, tokenizer):
    """Would catch: a constraint that starts again where the text goes on."""
    pytest.importorskip("llguidance")
    model, _ = models("qwen3")
    asked = request(grammar=Grammar("regex", "[a-f]{12}"), n=1, top_logprobs=2)
    (whole,) = ask(model, asked, tokenizer=tokenizer)
    engine = Engine(model, EngineConfig(**SIZES), tokenizer=tokenizer)
    engine.add([asked])
    for _ in range(5):
        engine.step()
    (begun,) = engine.abort("r")
    assert len(begun.token_ids) == 5
    (rest,) = ask(model, dataclasses.replace(asked, begun=(begun,)), tokenizer=tokenizer)
    assert rest == whole


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", "{"), "'r': the json_schema cannot be read"),
        (Grammar("json_schema", '{"type": "nonsense"}'), "'r': the json_schema cannot be read"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'), "'r': .*json_schema"),
        (Grammar("regex", "(a"), "'r': the regex cannot be read"),
        (Grammar("lark", "start: missing"), "'r': the lark cannot be read"),
    ],
    ids=str,
)
def test_constraints_that_cannot_be_met(models, tokenizer, grammar, message):
    """Would catch: an engine that dies with a bad constraint, or takes it and never ends."""
    pytest.importorskip("llguidance")
    model, _ = models("qwen3")
    engine = Engine(model, EngineConfig(**SIZES), tokenizer=tokenizer)
    with pytest.raises(GrammarError, match=message):
        engine.add([request(grammar=grammar)])
    assert not engine.has_work and len(engine.generate([request()])[0]) == 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
        (dict(presence_penalty=2.5), "presence_penalty=2.5 is outside"),
        (dict(frequency_penalty=math.nan), "frequency_penalty=nan"),
        (dict(top_logprobs=-1), "top_logprobs=-1"),
        (dict(stop=("a", "")), "empty text"),
        (dict(allowed_ids=(1, 2), banned_ids=(2, 1)), "leaves no token"),
        (dict(allowed_ids=()), "leaves no token"),
        (dict(logit_bias=((1, math.inf),)), "logit_bias holds inf"),
    ],
    ids=str,
)
def test_wishes_out_of_range(params, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(max_tokens=4, **params)


def test_ids_outside_the_vocabulary(models):
    with pytest.raises(ValueError, match="'r': token id 48 in allowed_ids"):
        ask(models("qwen3")[0], request(banned_ids=(VOCAB,)))
