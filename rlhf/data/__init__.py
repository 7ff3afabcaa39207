"""Data: dataset rows as prompts or as examples to imitate, the built-in tasks, and the position in the data.

`rlhf.data.tasks` and `rlhf.data.cursor` import neither torch nor datasets, so that a recipe can be checked
first.
"""

from __future__ import annotations

import importlib

_EXPORTS = {
    "PromptDataset": "rlhf.data.prompts",
    "SftDataset": "rlhf.data.prompts",
    "load_prompts": "rlhf.data.prompts",
    "load_sft": "rlhf.data.prompts",
    "num_steps": "rlhf.data.cursor",
    "step_rows": "rlhf.data.cursor",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rlhf.data' has no attribute {name!r}")
