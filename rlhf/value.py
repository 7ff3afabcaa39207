"""The critic's loss, and the sums from which its metrics are made.

Not here: returns (`rlhf.advantages`), and how a model gives values (`rlhf.values`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlhf.aggregate import aggregate
from rlhf.records import Batch


def value_loss(
    batch: Batch, values: torch.Tensor, *, value_clip: float | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """0.5 max((V - return)^2, (clip(V, V_old +- value_clip) - return)^2), mean over the step's loss tokens.

    values (B, T) of the current critic with gradient; `batch.returns` the targets; `batch.values` the critic's values
    before this update, read only to clip (PPO's own implementation; None: the plain squared error). The maximum stops
    the gradient where V has moved further than value_clip away from V_old and towards the return.

    The scalar is this micro-batch's share of the step's loss. Tokens outside the loss mask get exactly zero gradient,
    whatever stands there. The sums are described in `rlhf.losses`, and `finish_value` makes
    `value/explained_variance` of the last four. Raises ValueError if value_clip has nothing to clip around.
    """
    assert batch.returns is not None, "a value loss needs returns"
    mask = batch.loss_mask
    values, returns = torch.where(mask, values, 0.0), torch.where(mask, batch.returns, 0.0)
    squared = (values - returns).square()
    worst, held = squared, torch.zeros_like(mask)
    if value_clip is not None:
        if batch.values is None:
            raise ValueError(
                f"value_clip={value_clip} needs batch.values; score the batch with the critic, or use value_clip: null"
            )
        old_values = torch.where(mask, batch.values, 0.0)
        moved = values - old_values
        clipped = old_values + moved.clamp(-value_clip, value_clip)
        worst = torch.maximum(squared, (clipped - returns).square())
        held = (moved.abs() > value_clip) & (worst > squared)  # within the clip they differ by rounding only
    share = aggregate(
        0.5 * worst,
        mask,
        how="token_mean",
        num_loss_tokens=batch.num_loss_tokens,
        num_loss_sequences=batch.num_loss_sequences,
        constant_length=None,
    )
    with torch.no_grad():
        inside, targets = values.detach()[mask].double(), returns[mask].double()
        sums = {
            "num_tokens": mask.sum().double(),
            "value/loss": share.detach().double(),
            "value/clip_frac": held.sum().double(),
            "value/mean": inside.sum(),
            "critic_fit/return": targets.sum(),
            "critic_fit/return_squared": targets.square().sum(),
            "critic_fit/error": (targets - inside).sum(),
            "critic_fit/error_squared": (targets - inside).square().sum(),
        }
    return share, sums


def finish_value(sums: Mapping[str, torch.Tensor | float]) -> dict[str, float]:
    """`value/explained_variance` = 1 - Var(return - V) / Var(return) from added-up sums.

    1 = perfect, 0 = no better than a constant, below = worse. Left out where all returns are equal or there are none.
    A NaN among the tokens stays NaN.
    """
    num_tokens = float(sums["num_tokens"])
    if num_tokens == 0:
        return {}

    def moments(name: str) -> tuple[float, float]:
        mean = float(sums[f"critic_fit/{name}"]) / num_tokens
        square = float(sums[f"critic_fit/{name}_squared"]) / num_tokens
        return square - mean**2, square

    (returns, scale), (errors, _) = moments("return"), moments("error")
    if returns <= 1e-12 * scale:  # rounding of the difference of the two moments
        return {}
    return {"value/explained_variance": 1.0 - errors / returns}
