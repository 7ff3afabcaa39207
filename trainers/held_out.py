"""Held-out rows of the training data's kind: the loss on answers, the order of wanted and unwanted answers, verdicts on
steps.

Not here: responses to held-out prompts, and held-out pairs (`rlhf.trainers.evaluate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from rlhf.batching import in_batches, make_label_batch, make_sft_batch, make_step_batch
from rlhf.reward_loss import accuracy_interval
from rlhf.sequences import sequence_logprobs

if TYPE_CHECKING:
    from rlhf.trainers.stage import Stage


def evaluate_rows(name: str, rows: Any, stage: Stage) -> dict[str, float]:
    """`eval/<name>/...` of the rows under the present weights, as the stage's method measures them."""
    metrics = _MEASURES[stage.recipe.method](rows, stage)
    return {f"eval/{name}/{metric}": value for metric, value in metrics.items()}


def answers(rows: Any, stage: Stage) -> dict[str, float]:
    """sft: `loss`, the mean negative log-likelihood of the learned tokens in nats, and `perplexity`, e to the loss."""
    total, tokens = 0.0, 0
    for batch in in_batches(rows, make_sft_batch):
        total -= float(stage.actor.score(batch)[batch.loss_mask].double().sum())
        tokens += batch.num_loss_tokens
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def labels(rows: Any, stage: Stage) -> dict[str, float]:
    """kto: `auc`, how often a wanted answer scores higher than an unwanted one (equal scores count half), and the mean
    scores `reward_desirable` and `reward_undesirable`. The score is beta times the log-ratio to the reference."""
    scores, wanted = [], []
    for batch in in_batches(rows, make_label_batch):
        batch = stage.with_reference(batch)
        ratio = sequence_logprobs(stage.actor.score(batch) - batch.ref_logprobs, batch.loss_mask)
        scores.append(stage.recipe.kto.beta * ratio.double())
        wanted.append(batch.labels > 0)
    score, is_wanted = torch.cat(scores), torch.cat(wanted)
    good, bad = score[is_wanted], score[~is_wanted].sort().values
    lower, not_higher = torch.searchsorted(bad, good), torch.searchsorted(bad, good, right=True)
    return {
        "auc": float((lower + not_higher).double().mean()) / (2 * len(bad)),
        "reward_desirable": float(good.mean()),
        "reward_undesirable": float(bad.mean()),
    }


def steps(rows: Any, stage: Stage) -> dict[str, float]:
    """prm: `loss` per step, and `accuracy`, the share of verdicts that are right (score > 0 against label > 0.5), with a
    95 % interval; `label_mean` is what always saying yes would reach."""
    found, labelled = [], []
    for batch in in_batches(rows, make_step_batch):
        found.append(stage.actor.step_scores(batch)[batch.loss_mask].double())
        labelled.append(batch.token_labels[batch.loss_mask].double())
    scores, truth = torch.cat(found), torch.cat(labelled)
    right = int(((scores > 0) == (truth > 0.5)).sum())
    low, high = accuracy_interval(right, len(scores))
    return {
        "loss": float(binary_cross_entropy_with_logits(scores, truth)),
        "accuracy": right / len(scores),
        "accuracy_low": low,
        "accuracy_high": high,
        "label_mean": float(truth.mean()),
    }


_MEASURES: dict[str, Callable[[Any, Any], dict[str, float]]] = {
    "sft": answers,
    "kto": labels,
    "prm": steps,
}
