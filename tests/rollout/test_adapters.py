"""Requests with adapters of their own in one batch: each gets what the model with that adapter alone would write."""

import copy
import dataclasses
import json
import random

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.models.swap import swap_modules
from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams

VOCAB = 48
KINDS = {
    "all": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "few": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
}


def make_engine(model, **config):
    config = {"page_tokens": 16, "max_batch_tokens": 512, "max_sequences": 64, "prefix_cache": True} | config
    return Engine(model, EngineConfig(**config))


def make_requests(adapter="", count=5, n=2):
    """The same prompts and seeds for each adapter: what differs is the adapter's doing."""
    choose = random.Random(3)
    return [
        Request(
            f"{adapter}{i}",
            tuple(choose.randrange(VOCAB) for _ in range(choose.randint(1, 45))),
            SamplingParams(max_tokens=14, stop_ids=(11,), min_tokens=5),
            tuple(key(0, "adapters", i, j) for j in range(n)),
            adapter=adapter,
        )
        for i in range(count)
    ]


def adapted(model, kind, seed):
    """The model with an adapter as the trainer runs it."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **KINDS[kind])
    found = (
        peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).to(model.dtype).eval()
    )
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    swap_modules(found)
    return found


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def made(request, models, tmp_path_factory):
    """(the model, its adapters' folders, what each writes alone); "" is the model itself."""
    model = copy.deepcopy(models("qwen3")[0]).to(request.param)
    folders, expected = {}, {"": make_engine(model).generate(make_requests())}
    for seed, kind in enumerate(KINDS):
        with_adapter = adapted(model, kind, seed)
        folders[kind] = tmp_path_factory.mktemp(kind)
        with_adapter.save_pretrained(folders[kind])
        alone = make_engine(with_adapter).generate(
            [dataclasses.replace(r, adapter="") for r in make_requests(kind)]
        )
        expected[kind] = alone
    return model, folders, expected


def tokens(completions):
    return [[c.token_ids for c in group] for group in completions]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_batch_tokens": 13},
        {"cache_tokens": 112, "prefix_cache": False},
        {"draft_tokens": 4, "max_sequences": 5},
    ],
    ids=str,
)
def test_several_adapters_in_one_batch(made, config):
    """Would catch: a row with another's adapter, a linear left out, another scale or rounding, a prefix that was computed
    under another adapter, and rows that fill a bucket being taken for somebody's."""
    model, folders, expected = made
    engine = make_engine(model, **config)
    for kind, folder in folders.items():
        engine.add_adapter(kind, folder)
    mixed = [r for rows in zip(*(make_requests(kind) for kind in expected)) for r in rows]
    for _ in range(2):  # the second time with what the cache knows
        found = engine.generate(mixed)
        for at, kind in enumerate(expected):
            assert found[at :: len(expected)] == expected[kind]
    assert tokens(expected["all"]) != tokens(expected[""]) != tokens(expected["few"])
    assert engine.generate(make_requests("few")) == expected["few"]  # one for all rows


def test_an_adapter_is_the_merged_model(made, tmp_path):
    """Would catch: a scale that both this engine and the wrapped model get wrong."""
    model, folders, _ = made
    if model.dtype != torch.float32:
        pytest.skip("merging rounds the weights")
    engine = make_engine(model)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), folders["all"]).merge_and_unload().eval()
    engine.add_adapter("all", folders["all"])
    requests = [
        dataclasses.replace(r, params=SamplingParams(max_tokens=8, temperature=0.0))
        for r in make_requests("all")
    ]
    ours = engine.generate(requests)
    theirs = make_engine(merged).generate([dataclasses.replace(r, adapter="") for r in requests])
    for one, other in zip((c for g in ours for c in g), (c for g in theirs for c in g), strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_adapters_come_and_go(made):
    """Would catch: pages of an adapter's earlier weights under the same name, and one taken from requests in work."""
    model, folders, expected = made
    engine = make_engine(model)
    engine.add_adapter("few", folders["few"])
    assert engine.generate(make_requests("few")) == expected["few"] and engine.adapters == ("few",)
    engine.add(make_requests("few", 1))
    with pytest.raises(RuntimeError, match="'few' has 1 requests in work, 'few0' first"):
        engine.remove_adapter("few")
    engine.abort("few0")
    engine.remove_adapter("few")
    engine.add_adapter("few", folders["all"])  # other weights
    assert tokens(engine.generate(make_requests("few"))) == tokens(expected["all"])
    with pytest.raises(KeyError, match="there is no adapter 'all'"):
        engine.remove_adapter("all")


def test_what_is_refused(made, models, tmp_path):
    """Would catch: an adapter that is half applied, or applied to another model."""
    model, folders, _ = made
    engine = make_engine(model)
    with pytest.raises(ValueError, match="'x0': adapter 'x' is unknown; there are: none"):
        engine.generate(make_requests("x"))
    engine.add_adapter("few", folders["few"])
    with pytest.raises(ValueError, match="'few' is taken"):
        engine.add_adapter("few", folders["few"])
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        engine.add_adapter("x", tmp_path)
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM is no decoder of Llama's kind"):
        make_engine(models("gpt_neox")[0]).add_adapter("x", folders["few"])

    def folder(name, change_config=None, change_weights=None):
        config = json.loads((folders["few"] / "adapter_config.json").read_text())
        weights = load_file(folders["few"] / "adapter_model.safetensors")
        path = tmp_path / name
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config | (change_config or {})))
        save_file((change_weights or dict)(weights), path / "adapter_model.safetensors")
        return path

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for name, args, message in (
        ("dora", ({"use_dora": True},), "use_dora=True is not supported"),
        ("rank", ({"r": 3},), r"model.layers.\d.\w+.\w+ has .*the model needs"),
        (
            "width",
            (None, lambda w: w | {first: w[first][:, :-1].contiguous()}),
            "q_proj has .*the model needs",
        ),
        (
            "half",
            (None, lambda w: {k: v for k, v in w.items() if k != first}),
            "q_proj has .*the model needs",
        ),
        (
            "head",
            (None, lambda w: w | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32)}),
            "lm_head.lora_A.weight changes no linear",
        ),
        ("empty", (None, lambda w: {}), "holds no weights"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add_adapter(name, folder(name, *args))
    (tmp_path / "head" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read as a LoRA adapter"):
        engine.add_adapter("x", tmp_path / "head")
    assert engine.adapters == ("few",)
