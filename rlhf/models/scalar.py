"""Models that give a number instead of a distribution: reward models and critics.

A scalar model is a stock sequence-classification model with one label, prepared like any other
(`rlhf.models.load`), so that a reward model of the hub is loaded as it is and one of ours is loaded by plain
transformers. Under `packed_attention` its forward gives the score of every token, fp32; outside it is transformers'
own, which picks one token per row. `save_model` writes it. Not here: which tokens' scores are wanted
(`rlhf.values`), and what they mean.

The trap of plain transformers: it takes a row's score at the last token that is not the pad token. Where the pad token is
the end token and a text ends with it, that is the token before. Here it is always the last token.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from rlhf.models import attention
from rlhf.models.build import build_model
from rlhf.models.load import prepare, read_config, read_folder
from rlhf.recipe.schema import ModelConfig
from rlhf.rng import key

HEADS = ("load", "new", "zero")
_HEAD_WEIGHT = "score.weight"


def load_scalar_model(
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: str,
    seed: int,
    device: torch.device | str = "cpu",
    trainable: bool,
    model: nn.Module | None = None,
    invariant: bool = True,
    scale: float = 1.0,
    shift: float = 0.0,
) -> nn.Module:
    """A model with one number per token, prepared as `load_model` does it; with LoRA its head is trained whole.

    `head`: "load" takes a trained head as it is and wants one; "new" puts one on the trunk of a causal language
    model or of another classifier, drawn from N(0, 1/(hidden size + 1)) as a function of `seed` (2009.01325,
    appendix B); "zero" puts one there that starts at 0, for a critic without a reward model to start from. `model`
    is an object to start from instead of the recipe's (it is copied, never changed). Its numbers are `scale` times the
    head's plus `shift`: a critic that starts from a reward model predicts what is made of that model's scores.

    Raises ValueError as `load_model` does, for an architecture without a sequence-classification model, and with
    "load" for anything that is not a reward model with a trained head.
    """
    if head not in HEADS:
        raise ValueError(f"head {head!r} is unknown; choose one of {', '.join(HEADS)}")
    source = _source(model_config, tokenizer, head=head, seed=seed, model=model)
    name = model_config.path if model is None and model_config.path is not None else type(source).__name__
    if head == "load":
        _check_trained_head(source, name)
        scalar = source
    else:
        scalar = _with_head(source, name, None if head == "zero" else key(seed, "score head"))
    _pad_token(scalar, tokenizer)
    scalar.score.__class__ = ScoreHead
    scalar.score.weight.data.mul_(scale)
    scalar.score.shift = shift
    scalar.__class__ = _with_token_scores(type(scalar))
    return prepare(
        scalar,
        model_config,
        tokenizer,
        seed=seed,
        device=device,
        trainable=trainable,
        invariant=invariant,
        task="SEQ_CLS",
    )


def is_scalar_model(model_config: ModelConfig) -> bool:
    """Whether the folder or hub model that a recipe names is a sequence-classification model of whole texts: what judges
    steps gives logits of theirs."""
    config = read_config(model_config)
    return _classifies(config) and config.to_dict().get("step_separator") is None


def _classifies(config: Any) -> bool:
    return bool(config.architectures) and config.architectures[0].endswith("ForSequenceClassification")


def store_reward_scale(model: nn.Module, *, mean: float, std: float) -> None:
    """Keep what a reward model's scores on its training data are like in its configuration, to be saved with it.
    Raises ValueError for a scale that nothing can be divided by."""
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(
            f"scores with mean {mean} and standard deviation {std} give no scale; is the head trained?"
        )
    model.config.reward_mean, model.config.reward_std = mean, std


def reward_scale(model: nn.Module) -> tuple[float, float]:
    """(mean, standard deviation) that `store_reward_scale` kept. Raises ValueError if there are none."""
    return _reward_scale(model.config.to_dict())


def _reward_scale(config: Mapping[str, Any]) -> tuple[float, float]:
    if "reward_mean" not in config or "reward_std" not in config:
        raise ValueError(
            "the reward model's config.json has no reward_mean and reward_std: whoever trained it stored none; set "
            "reward_model.normalize: false"
        )
    return float(config["reward_mean"]), float(config["reward_std"])


def scale_of_scores(model_config: ModelConfig, *, weight: float, normalize: bool) -> tuple[float, float]:
    """(scale, shift) of what becomes of a reward model's scores: weight (score - mean) / std, without `normalize`
    weight score. Raises ValueError as `reward_scale` does."""
    mean, std = _reward_scale(read_config(model_config).to_dict()) if normalize else (0.0, 1.0)
    return weight / std, -weight * mean / std


def store_step_separator(model: nn.Module, separator: str) -> None:
    """Mark a model as a process reward model: keep what ends every step that it judges in its configuration."""
    model.config.step_separator = separator


def step_separator(model: nn.Module) -> str | None:
    """What `store_step_separator` kept; None for a model that judges whole responses."""
    return model.config.to_dict().get("step_separator")


class ScoreHead(nn.Linear):
    """One number for each row, in fp32 whatever the weights' type: bfloat16 would round a reward of 3 to 1/64. A
    row does not depend on the number of rows. Made from an `nn.Linear` by `load_scalar_model`."""

    shift: float = 0.0  # added to every number; not a parameter and not saved

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return (hidden.to(wide) * self.weight[0].to(wide)).sum(-1, keepdim=True) + self.shift


class _TokenScores:
    """Mixed into a sequence-classification class: the packed forward."""

    def forward(
        self, input_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None, **options: Any
    ) -> Any:
        """Under `packed_attention`: the score of every token, (N,) fp32. Elsewhere: transformers' own forward."""
        if not attention.in_context():
            return super().forward(input_ids=input_ids, position_ids=position_ids, **options)
        trunk = self.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return self.score(trunk.last_hidden_state)[0, :, 0]


@functools.cache
def _with_token_scores(stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass under the same name, which is what `save_pretrained` writes into config.json."""
    return type(stock.__name__, (_TokenScores, stock), {"__module__": stock.__module__})


def _source(
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: str,
    seed: int,
    model: nn.Module | None,
) -> nn.Module:
    """A causal language model or a classifier, from wherever the recipe says."""
    dtype = getattr(torch, model_config.dtype)
    if model is not None:
        return copy.deepcopy(model).to(dtype)
    if model_config.build is not None:
        return build_model(model_config.build, tokenizer, dtype=model_config.dtype, seed=seed)
    config = read_config(model_config)
    if not _classifies(config):
        if head == "load":
            raise _no_head(
                model_config.path, f"config.json names {', '.join(config.architectures or ['nothing'])}"
            )
        return read_folder(model_config, dtype)[0]
    classifier, missing = read_folder(
        model_config, dtype, AutoModelForSequenceClassification, optional=[_HEAD_WEIGHT]
    )
    if head == "load" and missing:
        raise _no_head(model_config.path, f"its files lack {_HEAD_WEIGHT}")
    return classifier


def _no_head(name: str, reason: str) -> ValueError:
    return ValueError(
        f"{name} is no reward model with a trained head: {reason}; its scores would be random. Give a model that was "
        "trained as a reward model (a sequence-classification model with one label), or train one first"
    )


def _check_trained_head(model: nn.Module, name: str) -> None:
    score = getattr(model, "score", None)  # where transformers' decoders have the head of a classifier
    if not isinstance(score, nn.Linear):
        raise _no_head(name, f"{type(model).__name__} has no linear layer named score")
    if score.out_features != 1 or score.bias is not None:
        bias = " and a bias" if score.bias is not None else ""
        raise _no_head(name, f"its head has {score.out_features} labels{bias}")
    if not score.weight.isfinite().all() or not score.weight.any():
        kind = "only zeros" if score.weight.isfinite().all() else "numbers that are not finite"
        raise _no_head(name, f"its head holds {kind}")


def _with_head(source: nn.Module, name: str, draw: int | None) -> nn.Module:
    """A classifier on the trunk of `source`, which it takes over; its head drawn with the key `draw`, or zeros."""
    config = source.config
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{name}: transformers has no sequence-classification model for {config.model_type}, so that it cannot "
            "become a reward model or a critic; use another architecture"
        )
    config.num_labels = 1
    with torch.device("meta"):
        scalar = AutoModelForSequenceClassification.from_config(config)
    trunk = source.base_model
    if type(trunk) is not type(scalar.base_model) or not isinstance(
        getattr(scalar, "score", None), nn.Linear
    ):
        raise ValueError(
            f"{name}: {type(scalar).__name__} is not built on a {type(trunk).__name__}; not supported"
        )
    setattr(scalar, scalar.base_model_prefix, trunk)
    assert scalar.config is config, "the trunk's layers read the choice of attention from this very object"
    size = scalar.score.in_features
    weight = torch.zeros(1, size)
    if draw is not None:
        weight.normal_(0.0, 1.0 / math.sqrt(size + 1), generator=torch.Generator().manual_seed(draw))
    scalar.score = nn.Linear(size, 1, bias=False, dtype=source.dtype)
    scalar.score.weight.data.copy_(weight)
    return scalar


def _pad_token(scalar: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets plain transformers score padded batches, where that cannot mistake an end token for padding."""
    config = scalar.config.get_text_config()
    if config.pad_token_id is None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        config.pad_token_id = tokenizer.pad_token_id
