"""A model with its tokenizer and its engine, from a folder or the hub, as the trainer loads it.

Not here: what it is asked (`rlhf.serving.generation`).
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.models.attention import kv_shapes, widest_window
from rlhf.models.load import (
    check_model_split,
    generation_stop_ids,
    load_model,
    load_tokenizer,
    read_config,
)
from rlhf.models.offload import offload_layers
from rlhf.models.parallel import TensorParallel
from rlhf.recipe.schema import ModelConfig, TokenizerConfig
from rlhf.rng import key
from rlhf.rollout import Engine, EngineConfig
from rlhf.rollout.cache import KVPages, free_pages
from rlhf.rollout.reach import Reach
from rlhf.rollout.request import KV_DTYPES
from rlhf.serving.settings import EngineSettings
from rlhf.serving.text import TokenTexts


@dataclass(frozen=True)
class Served:
    """What answers requests."""

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]  # the end of sequence, and what else the model's own generation_config names
    most_tokens: int  # of a prompt and its response: the model's context, or what the cache holds

    @cached_property
    def vocab(self) -> int:
        """Tokens that the model knows."""
        return self.engine.model.get_input_embeddings().num_embeddings

    @cached_property
    def most_characters(self) -> int:
        """Of a text that may have `most_tokens`: what is longer need not be cut into tokens to be refused."""
        return self.most_tokens * max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)


def load_served(settings: EngineSettings, name: str, *, cache_responses: bool = False) -> Served:
    """In as many processes as the settings say. Raises ValueError for what cannot be loaded, for files before weights."""
    settings = settings.model_copy(update={"device": _device(settings)})
    if settings.tensor_parallel == 1:
        return load_alone(settings, name, cache_responses=cache_responses)
    check_model_split(ModelConfig(path=settings.model), settings.tensor_parallel)
    from rlhf.serving.parallel import load_parallel

    return load_parallel(settings, name, cache_responses=cache_responses)


def load_alone(
    settings: EngineSettings,
    name: str,
    *,
    cache_responses: bool = False,
    parallel: TensorParallel | None = None,
    make_engine: Callable[..., Engine] = Engine,
) -> Served:
    """What one process loads: all, or the part that it has in `parallel`."""
    path = settings.model
    config = read_config(ModelConfig(path=path))
    model_config = ModelConfig(path=path, dtype=_dtype(settings.dtype, config))
    tokenizer = load_tokenizer(model_config, TokenizerConfig())
    stop_ids = tuple(dict.fromkeys([tokenizer.eos_token_id, *generation_stop_ids(model_config)]))
    model = _load(settings, model_config, tokenizer, parallel)
    context = model.config.get_text_config().max_position_embeddings
    reach = Reach(widest_window(model), settings.page_tokens)
    cache_tokens = settings.cache_tokens or _cache_tokens(model, settings, context, reach, parallel)
    engine_config = EngineConfig(
        page_tokens=settings.page_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        prefix_cache=True,
        cache_tokens=cache_tokens,
        kv_dtype=settings.kv_dtype,
        weights=settings.weights,
        policy=settings.policy,
        draft_tokens=settings.draft_tokens,
        cache_responses=cache_responses,
    )
    # one of its own: a tokenizer is not for two threads
    engine = make_engine(model, engine_config, tokenizer=copy.deepcopy(tokenizer))
    for adapter, folder in settings.adapters.items():
        Engine.add_adapter(engine, adapter, folder)
    # the last token of a sequence never gets keys and values
    in_cache = reach.longest(cache_tokens // settings.page_tokens) + 1
    return Served(name, engine, tokenizer, stop_ids, min(context, in_cache))


def _load(
    settings: EngineSettings,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    parallel: TensorParallel | None,
) -> Any:
    device, count = settings.device, settings.offload_layers
    if not count:
        device = device if parallel is None or device == "cpu" else f"cuda:{parallel.rank}"
        return load_model(model_config, tokenizer, seed=0, device=device, trainable=False, parallel=parallel)
    if parallel is not None:
        raise ValueError(
            f"--offload-layers {count} with --tensor-parallel {settings.tensor_parallel}: each is for a model larger than a GPU; "
            "choose one"
        )
    if torch.device(device).type == "cpu":
        raise ValueError(
            f"--offload-layers {count} with --device {device}: the weights are in host memory as it is; leave it out"
        )
    model: Any = load_model(model_config, tokenizer, seed=0, device="cpu", trainable=False)
    offload_layers(model, count, device)
    return model


def sample_seeds(seed: int | None, n: int) -> tuple[int, ...]:
    """A key for each of n samples: a function of `seed`, or random where that is None."""
    if seed is None:
        return tuple(secrets.randbits(63) for _ in range(n))
    return tuple(key(seed, "serve", index) for index in range(n))


def _device(settings: EngineSettings) -> str:
    """Which one is meant. Raises ValueError for one that cannot be used."""
    device, count = settings.device, settings.tensor_parallel
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device} cannot be used: {str(error).splitlines()[0]}; choose cpu"
        ) from None
    if count > 1 and device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device {device} is one device, --tensor-parallel {count} wants as many; choose cuda or cpu"
        )
    if count > 1 and device == "cuda" and torch.cuda.device_count() < count:
        raise ValueError(
            f"--tensor-parallel {count} wants as many GPUs and there are {torch.cuda.device_count()}; lower it"
        )
    return device


def _dtype(wanted: str, config: Any) -> str:
    if wanted != "auto":
        return wanted
    return "float32" if config.dtype in (torch.float32, "float32") else "bfloat16"


def _cache_tokens(
    model: Any, settings: EngineSettings, context: int, reach: Reach, parallel: TensorParallel | None
) -> int:
    """For max_sequences of the whole context, as far as the memory allows."""
    shapes = [(heads, size) for heads, size, _ in kv_shapes(model)]
    dtype = KV_DTYPES.get(settings.kv_dtype, model.dtype)
    pages = free_pages(KVPages(shapes, settings.page_tokens, dtype, model.device))
    if parallel is not None:
        pages = parallel.least("number of pages", pages)
    wanted = settings.max_sequences * reach.sample_pages(context, context)
    if not min(pages, wanted):
        raise ValueError("there is no memory for a single page of the key/value cache; set --cache-tokens")
    return min(pages, wanted) * settings.page_tokens
