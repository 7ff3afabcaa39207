"""From per-token losses to one number.

Every denominator is a count over the whole optimiser step (all micro-batches, all processes), known before
the first forward pass and passed in. A micro-batch's result is therefore its share of the step's loss: shares
are added, never averaged, and cutting the step differently does not change the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Counts(NamedTuple):
    """The denominators of one optimiser step."""

    num_loss_tokens: int
    num_loss_sequences: int  # sequences with at least one loss token
    constant_length: int | None  # tokens; only for the aggregation of that name


def token_mean(per_token: torch.Tensor, loss_mask: torch.Tensor, counts: Counts) -> torch.Tensor:
    """Sum over tokens / number of tokens: every token weighs the same (DAPO, arXiv 2503.14476)."""
    return per_token.sum() / max(counts.num_loss_tokens, 1)


def sequence_mean(per_token: torch.Tensor, loss_mask: torch.Tensor, counts: Counts) -> torch.Tensor:
    """Mean over sequences of each one's mean over its tokens: every response weighs the same, so that a token
    in a long one weighs less (GRPO, arXiv 2402.03300 eq. 3).
    """
    means = per_token.sum(-1) / loss_mask.sum(-1).clamp(min=1)
    return means.sum() / max(counts.num_loss_sequences, 1)


def constant_length(per_token: torch.Tensor, loss_mask: torch.Tensor, counts: Counts) -> torch.Tensor:
    """Sum over tokens / (number of sequences * constant): no weight depends on a length (Dr.GRPO, arXiv
    2503.20783). The constant is the same in every step: usually the longest response allowed.
    """
    if counts.constant_length is None or counts.constant_length < 1:
        raise ValueError(
            f"constant_length={counts.constant_length}: this aggregation divides by a number of tokens; pass "
            "the longest response allowed (rollout.max_response_tokens)"
        )
    return per_token.sum() / (max(counts.num_loss_sequences, 1) * counts.constant_length)


AGGREGATIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "constant_length": constant_length}


def aggregate(
    per_token: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    how: str,
    num_loss_tokens: int,
    num_loss_sequences: int,
    constant_length: int | None,
) -> torch.Tensor:
    """This micro-batch's share of the step's loss: a scalar to be added to the other micro-batches'.

    per_token (B, T) float; loss_mask (B, T) bool. What lies outside the mask does not matter (NaN included)
    and gets exactly zero gradient. The counts are the whole step's; a step without any loss token gives 0,
    not NaN. Raises ValueError for an unknown `how` or a missing constant.
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"aggregation {how!r} is unknown; choose one of {', '.join(AGGREGATIONS)}")
    assert per_token.shape == loss_mask.shape, (
        f"{tuple(per_token.shape)} losses, {tuple(loss_mask.shape)} mask"
    )
    masked = torch.where(loss_mask, per_token, 0.0)
    return AGGREGATIONS[how](masked, loss_mask, Counts(num_loss_tokens, num_loss_sequences, constant_length))
