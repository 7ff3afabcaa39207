"""Models and tokenizers: built or loaded, prepared for training and for the engine, saved for anyone."""

from rlhf.models.build import build_model, build_tokenizer
from rlhf.models.load import (
    check_own_tokens,
    context_length,
    generation_stop_ids,
    load_model,
    load_tokenizer,
    save_model,
)
from rlhf.models.probe import ExactnessReport, probe_exactness
from rlhf.models.scalar import load_scalar_model

__all__ = [
    "ExactnessReport",
    "build_model",
    "build_tokenizer",
    "check_own_tokens",
    "context_length",
    "generation_stop_ids",
    "load_model",
    "load_scalar_model",
    "load_tokenizer",
    "probe_exactness",
    "save_model",
]
