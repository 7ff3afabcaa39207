"""Rewards: functions that judge responses, and the scorer that calls them.

Loaded on demand: the process of the reward functions needs the functions only, not the scorer and its torch.
"""

from __future__ import annotations

import importlib

_EXPORTS = {
    "FUNCTIONS": "rlhf.reward.functions",
    "Judge": "rlhf.reward.judge",
    "JudgeReader": "rlhf.reward.judge",
    "RewardError": "rlhf.reward.results",
    "Scorer": "rlhf.reward.score",
    "resolve": "rlhf.reward.functions",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rlhf.reward' has no attribute {name!r}")
