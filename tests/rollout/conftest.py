"""Tiny models of several architectures, prepared for the engine, beside stock copies."""

import copy

import pytest
import torch
import transformers

VOCAB = 48
CONTEXT = 96
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
    initializer_range=0.3,  # far from uniform, so that a wrong position or mask changes tokens
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
_GQA = dict(num_key_value_heads=2, head_dim=8)
CONFIGS = {
    "llama": ("LlamaConfig", {**_GQA}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {**_GQA}),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": 9}),
    "gemma2": ("Gemma2Config", {**_GQA, "sliding_window": 9, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**_GQA, "sliding_window": 9, "query_pre_attn_scalar": 8}),
    "gpt_neox": ("GPTNeoXConfig", {}),
}


def build(name, dtype=torch.float32):
    """(prepared model, stock model with eager attention), the same weights."""
    from rlhf.models.swap import swap_modules

    config_name, extra = CONFIGS[name]
    config = getattr(transformers, config_name)(**{**_COMMON, **extra})
    torch.manual_seed(0)
    stock = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=dtype
    ).eval()
    prepared = copy.deepcopy(stock)
    prepared.set_attn_implementation("rlhf")
    swap_modules(prepared)
    return prepared, stock


@pytest.fixture(scope="session")
def models():
    """build(name), once per session and name. Tests must leave the weights as they are."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = build(name)
        return built[name]

    return get


@pytest.fixture
def fresh_model():
    """A prepared Qwen3 whose weights a test may change."""
    return build("qwen3")[0]


@pytest.fixture
def fresh():
    """fresh(name): the same of any architecture."""
    return lambda name: build(name)[0]
