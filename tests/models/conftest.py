"""Tiny models of the architectures that must work, and the packs they are run on."""

from dataclasses import dataclass

import pytest
import torch

from rlhf.models import build_model, build_tokenizer, load_model
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig, ModelConfig

_GQA = {"num_key_value_heads": 2, "head_dim": 16}
ARCHITECTURES = {
    "llama": _GQA,
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": _GQA,
    "mistral": {**_GQA, "sliding_window": 9},
    "gemma2": {**_GQA, "sliding_window": 9, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GQA, "sliding_window": 9},
    "gpt_neox": {},
}


def model_config(name="qwen3", dtype="float32", config=(), **changes):
    """A recipe's model section for a tiny model; large random weights make a wrong position or mask
    visible.
    """
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }
    build = BuildModelConfig(model_type=name, config={**sizes, **ARCHITECTURES[name], **dict(config)})
    return ModelConfig(build=build, dtype=dtype, **changes)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(BuildTokenizerConfig())


@pytest.fixture(scope="session")
def stock(tokenizer):
    """stock(name): the model as transformers runs it, eager attention."""

    def make(name, dtype="float32"):
        model = build_model(model_config(name).build, tokenizer, dtype=dtype, seed=0)
        model.set_attn_implementation("eager")
        return model.eval()

    return make


@pytest.fixture(scope="session")
def prepared(tokenizer):
    """prepared(name): the same weights as stock(name), prepared."""

    def make(name="qwen3", *, trainable=False, **changes):
        return load_model(model_config(name, **changes), tokenizer, seed=0, trainable=trainable)

    return make


@dataclass(frozen=True)
class Pack:
    """Some sequences one after another: what `rlhf.batching.PackedSequences` shows to the attention."""

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor

    def split(self, x):
        """(N, ...) -> one (n, ...) for each sequence."""
        return x.split(self.cu_seqlens.diff().tolist())


@pytest.fixture
def pack():
    def make(lengths, vocab=25, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return Pack(
            torch.randint(3, vocab, (sum(lengths),), generator=generator),
            torch.cat([torch.arange(n) for n in lengths]),
            torch.tensor([0, *lengths]).cumsum(0),
        )

    return make
