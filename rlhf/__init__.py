"""rlhf: train language models with feedback. `rlhf.cli` is the command line, the trainers the Python API."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

__version__ = "0.1.0"

# Waiting threads sleep instead of spinning: with any other busy process on the cores, spinning costs 4 to 60 times.
# OpenMP reads it when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# From a source checkout the parts lie beside this folder: kernels/, rollout/, reward/, trainers/.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

_EXPORTS = {
    f"{method}Trainer": "rlhf.api"
    for method in ("SFT", "Reward", "PRM", "PPO", "GRPO", "DPO", "OnlineDPO", "KTO", "Rejection", "Distill")
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
