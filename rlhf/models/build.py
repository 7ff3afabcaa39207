"""Tokenizers and models made on the spot, from a recipe alone.

Here: a character tokenizer, a byte-level BPE trained on a file, and a model with random weights of any
architecture that transformers knows. Not here: loading and saving, and what prepares a model for training
(`rlhf.models.load`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.recipe.preflight import tokenizer_build_faults
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from rlhf.rng import key

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
_SPECIAL = (PAD, BOS, EOS)

# A message is <|bos|>content<|eos|>: the text of an alphabet may not be able to spell roles.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|bos|>' + message['content'] + '<|eos|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>' }}{% endif %}"
)
# The same with roles, where every text can be spelt.
_CHAT_TEMPLATE_WITH_ROLES = (
    "{% for message in messages %}"
    "{{ '<|bos|>' + message['role'] + '\\n' + message['content'] + '<|eos|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(config: BuildTokenizerConfig) -> PreTrainedTokenizerFast:
    """A tokenizer with <|pad|>, <|bos|> and <|eos|> as ids 0, 1 and 2. It adds no special token by itself,
    and decoding gives back exactly the text. Raises ValueError for an unusable alphabet or training file.
    """
    for fault in tokenizer_build_faults(config):
        raise ValueError(str(fault.below(("tokenizer", "build"))))
    tokenizer = _characters(config.alphabet) if config.kind == "characters" else _bpe(config)
    template = _CHAT_TEMPLATE if config.kind == "characters" else _CHAT_TEMPLATE_WITH_ROLES
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def _characters(alphabet: str) -> Tokenizer:
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab))  # no unknown token: a foreign character is an error
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bpe(config: BuildTokenizerConfig) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(Path(config.train_on)), trainer)
    return tokenizer


def _texts(path: Path) -> Iterator[str]:
    """Lines of a text file; every string in the rows of a .jsonl file."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if path.suffix != ".jsonl":
                yield line
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from None
            yield from _strings(row)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def build_model(
    config: BuildModelConfig, tokenizer: PreTrainedTokenizerFast, *, dtype: str = "float32", seed: int = 0
) -> PreTrainedModel:
    """A causal language model with random weights, a function of (config, vocabulary size, seed). Weights are
    drawn in fp32 and rounded to `dtype`. Raises ValueError for an unknown architecture or configuration key.
    """
    hf_config = _hf_config(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "model"))
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    return model.to(getattr(torch, dtype))


def _hf_config(config: BuildModelConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    known = CONFIG_MAPPING.keys()
    if config.model_type not in known:
        close = difflib.get_close_matches(config.model_type, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"model.build.model_type: transformers knows no {config.model_type!r}{hint}")
    fixed = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    names = set(dir(CONFIG_MAPPING[config.model_type]())) | {"head_dim", "rope_theta", "rope_scaling"}
    for name in config.config:
        if name in fixed:
            raise ValueError(f"model.build.config.{name} comes from the tokenizer; leave it out")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"model.build.config: {config.model_type} has no {name!r}{hint}")
    try:
        return AutoConfig.for_model(config.model_type, **config.config, **fixed)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"model.build.config does not fit {config.model_type}: {error}") from error
