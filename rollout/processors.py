"""What changes the logits that a sample is drawn from: penalties, biases, allowed and banned tokens.

Here: `processed`, for the rows that ask for it. The policy's own logits stay as they are: they say the raw log-probs. Not
here: temperature, top-k, top-p and min-p (`rlhf.kernels.sampling`), grammars (`rlhf.rollout.grammar`).
"""

from __future__ import annotations

import numpy as np
import torch

from rlhf.rollout.request import SamplingParams


def changes_logits(params: SamplingParams) -> bool:
    """Whether `processed` does anything for these parameters."""
    return bool(
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.allowed_ids is not None
        or params.banned_ids
        or params.grammar is not None
    )


def processed(
    logits: torch.Tensor, params: SamplingParams, prompt: np.ndarray, response: np.ndarray
) -> torch.Tensor:
    """One row's logits (V,) of any float dtype -> (V,) fp32, a new tensor, for the next token after prompt (n,) and
    response (m,), int64.

    In this order: tokens that are not allowed, or banned, to -inf; biases are added; the repetition penalty divides a
    positive and multiplies a negative logit of every token in prompt or response (Keskar et al. 2019, arXiv
    1909.05858); frequency times a token's count in the response, and presence if it is there, are subtracted (as
    OpenAI's API defines them).
    """
    row = logits.float().clone()
    device = row.device
    if params.allowed_ids is not None:
        allowed = torch.as_tensor(params.allowed_ids, device=device)
        kept = row[allowed]
        row.fill_(-torch.inf)[allowed] = kept
    if params.banned_ids:
        row[torch.as_tensor(params.banned_ids, device=device)] = -torch.inf
    for token, bias in params.logit_bias:
        row[token] += bias
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.concatenate([prompt, response]))).to(device)
        scores, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if len(response) and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = np.unique(response, return_counts=True)
        row[torch.from_numpy(tokens).to(device)] -= (
            params.frequency_penalty * torch.from_numpy(counts).to(device, torch.float32)
            + params.presence_penalty
        )
    return row
