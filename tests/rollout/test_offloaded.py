"""An engine whose model has layers in host memory."""

import copy

import pytest
import torch
import transformers

from rlhf.models.offload import offload_layers
from rlhf.models.swap import swap_modules
from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig, Request, SamplingParams

VOCAB = 48


@pytest.fixture
def model():
    """Qwen3 of five layers."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=96, initializer_range=0.2, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="rlhf").eval()
    made.requires_grad_(False)
    swap_modules(made)
    return made


def make_engine(model):
    return Engine(
        model, EngineConfig(page_tokens=16, max_batch_tokens=64, max_sequences=16, prefix_cache=True)
    )


def make_requests():
    params = SamplingParams(max_tokens=20)
    prompts = [(1,), (5, 6, 7), tuple(range(40))]
    return [
        Request(f"r{i}", p, params, (key(0, "offloaded", i), key(1, "offloaded", i)))
        for i, p in enumerate(prompts)
    ]


def test_samples_are_those_of_the_whole_model(model):
    """Would catch: layers in host memory that change a draw, weights of before an update, and a cache that is not dropped by
    sleep because of them."""
    plain, requests = copy.deepcopy(model), make_requests()
    offload_layers(model, 3, "cpu")
    engine, whole = make_engine(model), make_engine(plain)
    assert engine._runner.forward.is_fused
    first = engine.generate(requests)
    assert first == whole.generate(requests)
    for of in (model, plain):
        for p in of.parameters():
            p.data.mul_(1.1)
    engine.set_version(1)
    whole.set_version(1)
    second = engine.generate(requests)
    assert second == whole.generate(requests)
    assert [c.logprobs for group in first for c in group] != [c.logprobs for group in second for c in group]
    engine.sleep()
    engine.wake()
    assert engine.generate(requests) == second


def test_no_graph_is_recorded_of_weights_that_come_and_go(model, monkeypatch):
    """Would catch: on a GPU, launches recorded with the buffers as they lay once."""
    monkeypatch.setattr("rlhf.rollout.runner.serves", lambda model: True)
    monkeypatch.setattr("rlhf.rollout.runner.Recorder", lambda device: None)
    config = dict(page_tokens=16, max_batch_tokens=64, max_sequences=16, prefix_cache=True, cuda_graphs=True)
    assert Engine(model, EngineConfig(**config))._runner.graphs is not None
    offload_layers(model, 3, "cpu")
    assert Engine(model, EngineConfig(**config))._runner.graphs is None
