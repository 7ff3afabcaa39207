"""Data: dataset rows as prompts, as examples to imitate or as judged answers, the built-in tasks, and the position
in the data.

`rlhf.data.tasks` and `rlhf.data.cursor` import neither torch nor datasets, so that a recipe can be checked
first.
"""

from __future__ import annotations

import importlib

_EXPORTS = {
    "Curriculum": "rlhf.data.curriculum",
    "LabelDataset": "rlhf.data.preferences",
    "PreferenceDataset": "rlhf.data.preferences",
    "PromptDataset": "rlhf.data.prompts",
    "SftDataset": "rlhf.data.sft",
    "StepDataset": "rlhf.data.steps",
    "load_labels": "rlhf.data.preferences",
    "load_preferences": "rlhf.data.preferences",
    "load_prompts": "rlhf.data.prompts",
    "load_sft": "rlhf.data.sft",
    "load_steps": "rlhf.data.steps",
    "mixed": "rlhf.data.mixture",
    "num_steps": "rlhf.data.cursor",
    "rows_from": "rlhf.data.cursor",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rlhf.data' has no attribute {name!r}")
