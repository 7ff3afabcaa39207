"""From log-probs of tokens to log-probs of whole responses.

Here: sums over a response, its length, and the weights by which LD-DPO evens out lengths. Not here: what is
done with two of them (`rlhf.preference`) or with one and a label (`rlhf.kto`).
"""

from __future__ import annotations

import torch


def sequence_logprobs(
    logprobs: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """log p(response) = sum over its tokens; with `weights` (B, T), the weighted sum.

    logprobs (B, T), mask (B, T) bool -> (B,) float64, nats, differentiable; 0 for a row without tokens.
    Summed in float64, because losses live on small differences between sums over thousands of tokens. What
    stands outside the mask does not matter (NaN included) and gets exactly zero gradient.
    """
    assert logprobs.shape == mask.shape, f"{tuple(logprobs.shape)} log-probs, {tuple(mask.shape)} mask"
    inside = torch.where(mask, logprobs, 0.0).double()
    return (inside if weights is None else inside * weights).sum(-1)


def sequence_lengths(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) bool -> (B,) float64, tokens in the mask."""
    return mask.sum(-1).double()


def desensitized_weights(
    mask: torch.Tensor, shared_lengths: torch.Tensor, *, ld_alpha: float
) -> torch.Tensor:
    """LD-DPO's weights (arXiv 2409.06411): 1 for a response's first tokens, `ld_alpha` for those after them.

    mask (B, T) bool; shared_lengths (B,), the number of tokens of the pair's shorter response -> (B, T)
    float64, 0 outside the mask. ld_alpha = 1 is the plain sum, 0 cuts the longer response off. Tokens are
    counted by the mask, so that a tool's do not use up the shared length.
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha={ld_alpha} must be between 0 (cut off) and 1 (the plain sum)")
    beyond = mask.cumsum(-1) > shared_lengths[:, None]
    return mask.double().masked_fill(mask & beyond, ld_alpha)
