"""A worker with an engine and nothing else, for the tests of split rollouts; it is imported by the actors too."""

from __future__ import annotations

import os
import signal

import torch
import transformers

from rlhf.models.swap import swap_modules
from rlhf.rollout import Engine, EngineConfig
from rlhf.trainers.handover import HandoverMethods

VOCAB = 48


def make_engine(**sizes) -> Engine:
    """The same weights everywhere."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.set_attn_implementation("rlhf")
    swap_modules(model)
    sizes = {"page_tokens": 16, "max_batch_tokens": 512, "max_sequences": 64, "prefix_cache": True} | sizes
    return Engine(model, EngineConfig(**sizes))


class Sampling(HandoverMethods):
    def __init__(self, info, **sizes) -> None:
        torch.set_num_threads(1)
        self.engine = make_engine(**sizes)
        self._dies_in: int | None = None

    def _begin_sampling(self, role: str) -> Engine:
        self.engine.wake()
        return self.engine

    def _end_sampling(self, engine: Engine) -> None:
        assert engine.pages_in_use == 0

    def die_in(self, batch: int) -> None:
        """Kill this process in the prefill of the batch of that number."""
        self._dies_in = batch

    def prefill(self, batch, requests, bucket_bytes):
        if batch == self._dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prefill(batch, requests, bucket_bytes)

    def rollout_stats(self) -> dict[str, float]:
        return dict(self.engine.stats)
