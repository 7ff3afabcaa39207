"""What a judge's logits say: the probability of one of two verdicts, and the win rates that pairs add up to.

Not here: what the judge reads (`rlhf.reward.judge`), and its forward pass (`rlhf.trainers.worker`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def verdict_probabilities(logits: torch.Tensor, good_id: int, bad_id: int) -> torch.Tensor:
    """(M, V) logits of the next token -> (M, 2) fp32: p(good) / (p(good) + p(bad)), and p(good) + p(bad).

    The first is the judgement, exactly, without sampling; the second says whether the judge is answering the question at
    all (RLAIF's soft labels, arXiv 2309.00267 section 3.1).
    """
    logprobs = torch.log_softmax(logits.float(), -1)[:, [good_id, bad_id]]
    return torch.stack([torch.sigmoid(logprobs[:, 0] - logprobs[:, 1]), logprobs.exp().sum(-1)], -1)


def win_rates(size: int, first_wins: Mapping[tuple[int, int], float]) -> list[float]:
    """Of each of `size` responses, the mean probability of beating another one.

    `first_wins[i, j]` is the probability that i beats j where i was shown first; every pair is there in both orders, and
    p(i beats j) = (first_wins[i, j] + 1 - first_wins[j, i]) / 2, free of a preference for either place. The rates of a
    group have mean 1/2. Raises ValueError for fewer than two responses.
    """
    if size < 2:
        raise ValueError("a judge of pairs needs two responses to a prompt; use a template with {response}")
    rates = []
    for i in range(size):
        others = [j for j in range(size) if j != i]
        rates.append(sum(0.5 * (first_wins[i, j] + 1.0 - first_wins[j, i]) for j in others) / len(others))
    return rates
