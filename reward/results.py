"""What a reward function may return, and what is made of it. Imports no torch: the functions' process reads it too.

Not here: calling the functions (`rlhf.reward.score`, `rlhf.reward.child`).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

MAX_MAGNITUDE = 1e6  # a larger reward is a bug of the function, and would drown a float32 sum


class RewardError(RuntimeError):
    """Scoring cannot go on: a reward function breaks its contract, or too many rewards are missing."""


@dataclass(frozen=True)
class Judgement:
    """What one reward function says of one response: a value, or why there is none."""

    value: float | None = None
    error: str | None = None
    timeout: bool = False


def read_result(function: str, result: Any, n: int) -> list[Judgement]:
    """The list that a function returned for n responses. Raises RewardError where it breaks its contract."""
    if isinstance(result, np.ndarray) or _is_tensor(result):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise RewardError(
            f"reward function {function}: returned {type(result).__name__}, must return a list of {n} numbers"
        )
    if len(result) != n:
        raise RewardError(f"reward function {function}: returned {len(result)} rewards for {n} responses")
    return [_read_value(function, i, value) for i, value in enumerate(result)]


def _read_value(function: str, index: int, value: Any) -> Judgement:
    if value is None:
        return Judgement(error=f"returned None at index {index}")
    if isinstance(value, np.bool_) or (_is_tensor(value) and value.numel() == 1):
        value = value.item()
    if not isinstance(value, Real):
        raise RewardError(
            f"reward function {function}: index {index} is {value!r} ({type(value).__name__}), "
            "must be a number or None (= could not judge)"
        )
    number = float(value)
    if not math.isfinite(number):
        return Judgement(error=f"returned {number} at index {index}")
    if abs(number) > MAX_MAGNITUDE:
        return Judgement(error=f"returned {number:g} at index {index}, beyond {MAX_MAGNITUDE:g}")
    return Judgement(value=number)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever made a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)
