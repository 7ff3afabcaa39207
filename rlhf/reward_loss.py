"""Losses that train a scalar head: Bradley-Terry on pairs, cross-entropy on the steps of a solution.

Here: the losses and the interval that goes with an accuracy. Not here: the model (`rlhf.models`) and how
scores are read off it (`rlhf.values`).
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rlhf.preference import pair_rows
from rlhf.records import Batch

Sums = dict[str, torch.Tensor]


def bradley_terry(scores: torch.Tensor, batch: Batch, *, center_coef: float) -> tuple[torch.Tensor, Sums]:
    """Mean over pairs of -log s(r_w - r_l - margin) + center_coef (r_w + r_l)^2.

    scores (B,) with gradient, one for each row; batch with labels, group_ids and perhaps margins (arXiv
    2307.09288 eq. 2); rows without loss tokens are left out. Only differences of scores count in the first
    term: centring (arXiv 2312.09244) keeps them around 0. The scalar is this micro-batch's share of the
    step's loss: the denominator is num_loss_sequences / 2. Sums over pairs beside `num_pairs`: rm/margin =
    r_w - r_l, rm/accuracy (ties count half), rm/reward_chosen, rm/reward_rejected. Raises ValueError for a
    row without its partner.
    """
    chosen, rejected = pair_rows(batch)
    exact = scores.double()
    r_w, r_l = exact[chosen], exact[rejected]
    wanted = r_w - r_l if batch.margins is None else r_w - r_l - batch.margins.double()[chosen]
    losses = -logsigmoid(wanted) + center_coef * (r_w + r_l).square()
    share = (losses.sum() / max(batch.num_loss_sequences / 2, 1)).to(scores.dtype)
    r_w, r_l = r_w.detach(), r_l.detach()
    return share, {
        "num_pairs": torch.full_like(r_w, 1.0).sum(),
        "rm/loss": share.detach().double(),
        "rm/accuracy": ((r_w > r_l).double() + 0.5 * (r_w == r_l).double()).sum(),
        "rm/margin": (r_w - r_l).sum(),
        "rm/reward_chosen": r_w.sum(),
        "rm/reward_rejected": r_l.sum(),
    }


def prm_loss(token_scores: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Sums]:
    """Mean over steps of the cross-entropy between s(score) and the step's label, at each step's last token.

    Process reward model (arXiv 2305.20050; labels between 0 and 1 as in arXiv 2312.08935 soft estimation).
    token_scores (B, T) with gradient, logits; batch with token_labels, and a loss_mask that is True at the
    steps' last tokens only. The scalar is this micro-batch's share of the step's loss: the denominator is
    num_loss_tokens. Sums over steps beside `num_tokens`: prm/accuracy (score > 0 against label > 0.5),
    prm/label_mean (what always saying yes would reach), prm/score_mean. Raises ValueError where a step has no
    label.
    """
    assert batch.token_labels is not None, "prm_loss needs token_labels"
    scores = token_scores[batch.loss_mask]
    labels = batch.token_labels[batch.loss_mask].to(scores.dtype)
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(
            "a step's label is missing or not between 0 and 1; the loss mask must mark labelled steps"
        )
    share = binary_cross_entropy_with_logits(scores, labels, reduction="sum") / max(batch.num_loss_tokens, 1)
    return share, {
        "num_tokens": batch.loss_mask.sum().double(),
        "prm/loss": share.detach().double(),
        "prm/accuracy": ((scores > 0) == (labels > 0.5)).double().sum(),
        "prm/label_mean": labels.double().sum(),
        "prm/score_mean": scores.detach().double().sum(),
    }


def accuracy_interval(correct: float, total: int) -> tuple[float, float]:
    """The Wilson score interval that covers the true accuracy 95 times in 100 (Wilson, JASA 1927).

    correct of total, a tie counted as half. Unlike the normal approximation it stays within [0, 1] and does
    not shrink to nothing at 0 or 1. Raises ValueError for total < 1 or correct outside [0, total].
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(
            f"{correct} correct of {total}: an accuracy needs at least one case and 0 <= correct <= total"
        )
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    share = correct / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return middle - half, middle + half
