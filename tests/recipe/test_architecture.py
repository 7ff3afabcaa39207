"""Architectures read from the source of transformers are what transformers says when it is asked."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from rlhf.recipe.architecture import architecture_faults, causal_architectures, config_class, context_tokens
from rlhf.recipe.functions import built_in
from rlhf.recipe.schema import BuildModelConfig
from rlhf.recipe.source_code import parameters_of

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "gpt2",
    "phi3",
    "mixtral",
    "olmo2",
)


def said(model_type, **config):
    faults = architecture_faults(BuildModelConfig(model_type=model_type, config=config))
    return {".".join(f.keys[0]): f"{f.message}; {f.hint}" for f in faults}


def test_the_names_are_those_of_transformers():
    """Catches: a table that moved to another file, with which every architecture would be unknown or none checked."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(causal_architectures()) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys_and_defaults_are_those_of_the_class(model_type):
    """Catches: a key refused that the class takes, inherited ones too; a contradiction seen in a default that is none."""
    from transformers import CONFIG_MAPPING

    config, described = CONFIG_MAPPING[model_type](), config_class(model_type)
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    assert set(fields) <= described.names and set(fields) - set(described.fields) <= {"transformers_version"}
    for name, default in fields.items():
        if isinstance(described.default(name), int | float | str):
            assert described.default(name) == default, name
    assert {
        "head_dim",
        "rope_theta",
        "rope_scaling",
        *getattr(config, "attribute_map", ()),
    } <= described.names
    assert said(model_type) == {}


@pytest.mark.parametrize(
    ("model_type", "config", "key", "message"),
    [
        ("qwen33", {}, "model_type", "'qwen33' is no architecture of transformers; did you mean qwen3?"),
        ("albert", {}, "model_type", "'albert' is no causal language model"),
        ("qwen3", {"hiden_size": 3}, "config.hiden_size", "qwen3 has no such key; did you mean hidden_size?"),
        ("qwen3", {"vocab_size": 3}, "config.vocab_size", "comes from the tokenizer; leave it out"),
        ("qwen3", {"hidden_size": "many"}, "config.hidden_size", "'many' is not an int; qwen3's own is 4096"),
        ("qwen3", {"tie_word_embeddings": 1}, "config.tie_word_embeddings", "1 is not a bool"),
        ("qwen3", {"num_hidden_layers": 0}, "config.num_hidden_layers", "0 is not above 0"),
        (
            "llama",
            {"hidden_size": 100, "num_attention_heads": 6},
            "config.hidden_size",
            "=100 is not a multiple of .*=6; use",
        ),
        (
            "llama",
            {"num_attention_heads": 3},
            "config.num_attention_heads",
            "hidden_size=4096 (the default) is not",
        ),
        (
            "qwen3",
            {"num_attention_heads": 4},
            "config.num_attention_heads",
            "num_key_value_heads=32 (the default); set num_k",
        ),
        (
            "qwen3",
            {"num_key_value_heads": 5},
            "config.num_key_value_heads",
            "num_attention_heads=32 (the default) is not",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention"]},
            "config.layer_types",
            "1 entries for num_hidden_layers=32 (the",
        ),
    ],
)
def test_wrong_values_are_named_with_a_way_out(model_type, config, key, message):
    found = said(model_type, **config)
    assert list(found) == [key], found
    for part in message.split(".*"):
        assert part in found[key]


def test_values_that_go_together_pass():
    """Catches: a head size of its own taken for hidden_size / heads; heads of another name; MLA."""
    assert said("qwen3", hidden_size=100, num_attention_heads=6, num_key_value_heads=3, head_dim=16) == {}
    assert said("llama", hidden_size=100, num_attention_heads=6, head_dim=16) == {}
    assert said("llama", rope_theta=1e6, rope_parameters={"rope_type": "default"}, rms_norm_eps=1e-5) == {}
    assert said("gpt2", n_embd=48, n_layer=2, n_head=4) == {}
    assert said("glm4_moe_lite", num_hidden_layers=2) == {}


def test_the_context_of_a_built_model():
    assert context_tokens(BuildModelConfig(model_type="qwen3", config={"max_position_embeddings": 77})) == 77
    assert context_tokens(BuildModelConfig(model_type="llama")) == 2048
    assert context_tokens(BuildModelConfig(model_type="no_such")) is None


def test_torch_is_not_needed():
    code = (
        "import sys\nfrom rlhf.recipe.architecture import config_class\nfrom rlhf.recipe.functions import built_in\n"
        "assert config_class('qwen3').fields and built_in()\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_built_in_rules_are_those_of_the_scorer():
    """Catches: a rule whose arguments the check reads differently, or a table that it no longer finds."""
    from rlhf.reward import FUNCTIONS

    assert built_in().keys() == FUNCTIONS.keys()
    for name, function in FUNCTIONS.items():
        assert built_in()[name] == parameters_of(function), name
