"""A backward that must not be differentiated again.

torch's `once_differentiable` sees gradients that need gradients, not saved inputs that do: a penalty on gradients would lose
its term in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the `backward` of an autograd function: raises RuntimeError where a graph of it is asked for."""

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{backward.__qualname__} has no gradient of its own, which create_graph=True asks for; load the model "
                "without rlhf.models to take second derivatives"
            )
        return backward(ctx, *grads)

    return refusing
