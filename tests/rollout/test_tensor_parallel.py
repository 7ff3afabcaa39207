"""One model over two processes, against the engine of the whole model, bit by bit."""

import dataclasses
import time

import parallel_ranks as ranks
import peft
import pytest
import torch

from rlhf.models.parallel import ParallelError, Rows, check_sizes, shard
from rlhf.models.swap import swap_modules
from rlhf.rng import key
from rlhf.rollout import Request, SamplingParams

PROMPTS = [(1,), (5, 6, 7), tuple(range(33)), tuple(range(33)) + (4, 5), (9,) * 17, (3, 1, 4, 1, 5, 9, 2, 6)]
SPECIAL = dict(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, logit_bias=((7, 2.0),), banned_ids=(3,), top_logprobs=2)  # fmt: skip
CONFIGS = {
    "roomy": {},
    "chunks": {"max_batch_tokens": 23, "draft_tokens": 4},
    "preempted": {"cache_tokens": 160, "prefix_cache": False},
    "swapped": {"cache_tokens": 160, "preemption": "swap"},
}


def requests(n=2, stream=False, name="r", **params):
    params = SamplingParams(**{"max_tokens": 20, "stop_ids": (11,)} | params)
    return [
        Request(f"{name}{i}", p, params, tuple(key(0, "tp", i, j) for j in range(n)), stream=stream)
        for i, p in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def pair():
    made = ranks.Pair()
    yield made
    made.close()


def whole(kind, dtype, calls, config=None):
    engine = ranks.make_engine(ranks.build(kind, dtype), **config or {})
    return [(engine.generate(call), engine.counts) for call in calls]


@pytest.mark.parametrize(
    ("kind", "dtype", "config"),
    [
        *(("qwen3", torch.float32, config) for config in CONFIGS),
        *(("llama", torch.bfloat16, config) for config in ("chunks", "preempted")),
        ("qwen2", torch.float32, "roomy"),
        ("gemma3", torch.bfloat16, "chunks"),
    ],
    ids=str,
)
def test_tokens_and_logprobs_are_those_of_the_whole_model(pair, kind, dtype, config):
    """Would catch: an output that is added up in parts or stands in another's place, heads that read others' keys, a token
    that is looked up in the wrong process, a bias that is left out, and a schedule that is not the same."""
    calls = [requests(), requests(name="again", **SPECIAL)]
    expected = whole(kind, dtype, calls, CONFIGS[config])
    for found, is_fused in pair.both(ranks.generated, kind, dtype, calls, CONFIGS[config]):
        assert found == expected
        assert is_fused == (kind != "gemma3")
    (_, first), (_, second) = expected
    assert config not in ("preempted", "swapped") or first["preempted"]
    assert second["hit_tokens"] or config == "preempted"


@pytest.mark.parametrize("config", [{"weights": "int8"}, {"weights": "int4"}, {"kv_dtype": "int8"}, {"kv_dtype": "fp8"}], ids=str)  # fmt: skip
def test_rounded_weights_and_keys_are_rounded_alike(pair, config):
    """Would catch: scales over what one process has, and another form of a product because its part is narrower."""
    expected = whole("llama", torch.bfloat16, [requests()], config)
    for found, _ in pair.both(ranks.generated, "llama", torch.bfloat16, [requests()], config):
        assert found == expected


def test_adapters_of_requests(pair, tmp_path):
    """Would catch: a change that is added to other outputs than its own, or made of a part of the inputs."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(ranks.build("qwen3"), config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    adapted.save_pretrained(tmp_path)
    mixed = [
        dataclasses.replace(r, adapter="a" if i % 2 else "", id=f"{r.id}/{i}")
        for i, r in enumerate(requests())
    ]
    engine = ranks.make_engine(ranks.build("qwen3"))
    engine.add_adapter("a", tmp_path)
    expected = engine.generate(mixed)
    assert expected != engine.generate([dataclasses.replace(r, adapter="") for r in mixed])
    for [(found, _)], _ in pair.both(ranks.generated, "qwen3", torch.float32, [mixed], adapters={"a": tmp_path}):  # fmt: skip
        assert found == expected


def test_requests_come_and_go_while_weights_change(pair):
    """Would catch: new weights of which a process takes another's rows or none, a packed copy of the old ones, and news that
    only one of the processes has."""
    given = requests(stream=True), requests(stream=True, name="late")
    expected = ranks.come_and_go(None, "qwen3", *given)
    versions = {v for u in expected[0] for update in u for d in update.deltas for v in d.policy_versions}
    assert versions == {0, 7}
    own, other = pair.both(ranks.come_and_go, "qwen3", *given)
    assert own == other == expected


def test_each_has_half(pair):
    """Would catch: a process that keeps the whole model, or keys of all heads."""
    weights, pages, num_pages = ranks.sizes(None, "qwen3", requests())
    for own, own_pages, own_num_pages in pair.both(ranks.sizes, "qwen3", requests()):
        assert own_num_pages == num_pages and own_pages * 2 == pages
        assert own < 0.53 * weights  # norms are everywhere, and one of 51 tokens is


def test_the_cache_is_as_large_as_the_least_memory_allows(pair):
    """Would catch: processes with different numbers of pages, which schedule differently and wait for each other for ever."""
    (own, pages), other = pair.both(ranks.with_less_memory, "qwen3", requests())
    assert other == (own, pages) and pages == 20
    assert own == whole("qwen3", torch.float32, [requests()])[0][0]


def test_other_work_is_an_error_that_names_the_rank(pair):
    """Would catch: a hang, or samples of no model, where processes were given different requests."""
    longer = [dataclasses.replace(r, prompt_ids=(*r.prompt_ids, 8)) for r in requests()]
    for first, then in pair.both(ranks.failing, "qwen3", (requests(), longer)):
        assert first.startswith("ParallelError: rank 1 of 2 has another step than rank 0")
        assert then.startswith("ParallelError: the processes came apart before: rank 1 of 2 has another step")
    for found in pair.both(ranks.elsewhere):
        assert found.startswith("ParallelError: rank 1 of 2 is at other work than rank 0 (exchange 1 and 1;")


def test_a_process_that_dies_is_an_error_in_the_others():
    """Would catch: an engine that waits for ever for one that is gone."""
    pair = ranks.Pair()
    try:
        assert pair.both(ranks.place) == (0, 1)  # it has started
        began = time.monotonic()
        with pytest.raises(ParallelError, match=r"rank 0 of 2 waited for the others' .* in vain"):
            pair.both(ranks.stepping, "qwen3", requests(), 3)
        assert time.monotonic() - began < 20
    finally:
        pair.close()


class Rank:
    """A process of some whose exchanges are not looked at."""

    rank, size = 0, 2


def test_what_cannot_be_split_is_refused():
    """Would catch: a process that gets half a head, and weights that are left out where nobody looks."""
    sizes = dict(num_attention_heads=6, num_key_value_heads=3, intermediate_size=129, vocab_size=51)
    with pytest.raises(ValueError, match="num_key_value_heads=3, intermediate_size=129 .* over 1, 3$"):
        check_sizes(sizes, 2)
    model = ranks.build("qwen3")
    before = {name: p.shape for name, p in model.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="adapters are merged first"):
        shard(peft.get_peft_model(ranks.build("qwen3"), config), Rank())
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn is no part of a decoder of Llama's kind"):
        shard(model, Rank())
    del model.model.layers[1].self_attn.sinks
    model.model.layers[0].mlp.down_proj.__class__ = torch.nn.Linear
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj is no row-invariant linear"):
        shard(model, Rank())
    assert before == {name: p.shape for name, p in model.named_parameters()}  # refused before it was touched
    swap_modules(model)
    assert shard(model, Rank()).lm_head.rows == Rows(0, 25, 51)
