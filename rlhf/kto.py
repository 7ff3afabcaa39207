"""Losses on single responses that are labelled desirable or undesirable: KTO and BCO.

Here: the losses, the baselines that they compare a row with, and the mismatched batch from which KTO's comes.
Not here: losses on pairs (`rlhf.preference`). rho(y) = log policy(y|x) - log reference(y|x), s the sigmoid.

Baselines are a property of the whole optimiser step. They are computed once, without gradient, before the
update begins, and travel in `Batch.baselines`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from rlhf.batching import recount
from rlhf.records import Batch
from rlhf.sequences import sequence_logprobs

Sums = dict[str, torch.Tensor]

# Which count a metric's sum is divided by, where it is not num_sequences.
KTO_COUNTS = {
    "kto/reward_desirable": "num_desirable",
    "kto/reward_undesirable": "num_undesirable",
    "kto/logprob_desirable": "num_desirable",
    "kto/logprob_undesirable": "num_undesirable",
}


def kto_loss(
    batch: Batch,
    logprobs: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[torch.Tensor, Sums]:
    """Mean over rows of w_D (1 - s(beta (rho - z0))) or w_U (1 - s(beta (z0 - rho))), arXiv 2402.01306.

    batch: labels (> 0 desirable, < 0 undesirable), ref_logprobs, and baselines = z0 from `with_kto_baseline`.
    logprobs (B, T) of the current policy with gradient, nats. The scalar is this micro-batch's share of the
    step's loss: the denominator is num_loss_sequences. Rows without loss tokens are left out. The paper wants
    w_D n_D / (w_U n_U) between 1 and 3/2 for n_D desirable and n_U undesirable rows.

    Sums beside `num_sequences`, `num_desirable`, `num_undesirable`: kto/reward_{desirable,undesirable} = beta
    rho, kto/logprob_{desirable,undesirable}, kto/baseline = z0 in nats. Raises ValueError for missing fields.
    """
    rho, sums = _log_ratio_and_sums(batch, logprobs, beta)
    assert batch.baselines is not None and batch.labels is not None
    distance = beta * (rho - batch.baselines.double())
    losses = torch.where(
        batch.labels > 0,
        desirable_weight * torch.sigmoid(-distance),
        undesirable_weight * torch.sigmoid(distance),
    )
    return _finish(batch, losses, sums, logprobs.dtype)


def bco_loss(
    batch: Batch,
    logprobs: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[torch.Tensor, Sums]:
    """Mean over rows of -w_D log s(beta (rho - d)) or -w_U log s(-beta (rho - d)), arXiv 2404.04656.

    d is the baseline, from `with_bco_baseline`. Otherwise as `kto_loss`, metrics' names included. The paper's
    density-ratio weights for undesirable rows of other prompts are not here.
    """
    rho, sums = _log_ratio_and_sums(batch, logprobs, beta)
    assert batch.baselines is not None and batch.labels is not None
    distance = beta * (rho - batch.baselines.double())
    losses = torch.where(
        batch.labels > 0,
        -desirable_weight * logsigmoid(distance),
        -undesirable_weight * logsigmoid(-distance),
    )
    return _finish(batch, losses, sums, logprobs.dtype)


LABEL_LOSSES = {"kto": kto_loss, "bco": bco_loss}


# -- baselines ---------------------------------------------------------------------------------------------


def mismatched(batch: Batch, *, max_tokens: int) -> Batch:
    """Every row's prompt with the next row's response (the last with the first's): where KTO measures its z0.

    As in the paper, but over the whole step's batch. The response is what stands from the first token of
    response_mask on, cut where the row would exceed `max_tokens`; masks and counts are those of the new rows,
    labels, log-probs and rewards are left out. Next to each other, rows of one prompt are not mismatched:
    shuffle them. Raises ValueError for fewer than two rows, or where no token of the response fits.
    """
    size = len(batch)
    if size < 2:
        raise ValueError(
            f"a batch of {size} rows has no mismatched pair; KTO needs at least 2 rows in a step"
        )
    prompts = _prompt_lengths(batch).tolist()
    lengths = batch.lengths.tolist()
    rows = []
    for row, prompt in enumerate(prompts):
        other = (row + 1) % size
        end = min(lengths[other], prompts[other] + max_tokens - prompt)
        if prompt >= max_tokens:
            raise ValueError(
                f"sample {batch.sample_ids[row]!r} has a prompt of {prompt} tokens, which leaves no room for "
                f"a response in max_tokens={max_tokens}"
            )
        rows.append((row, prompt, other, prompts[other], end))
    width = max(prompt + end - start for _, prompt, _, start, end in rows)

    def joined(values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros(size, width)
        for row, prompt, other, start, end in rows:
            out[row, :prompt] = values[row, :prompt]
            out[row, prompt : prompt + end - start] = values[other, start:end]
        return out

    return recount(
        Batch(
            sample_ids=tuple(
                f"{batch.sample_ids[row]}|{batch.sample_ids[other]}" for row, _, other, _, _ in rows
            ),
            token_ids=joined(batch.token_ids),
            attention_mask=joined(batch.attention_mask),
            response_mask=joined(batch.response_mask),
            loss_mask=joined(batch.loss_mask),
            num_loss_tokens=0,
            num_loss_sequences=0,
        )
    )


def kto_baseline(policy_mismatched: torch.Tensor, ref_mismatched: torch.Tensor) -> torch.Tensor:
    """z0 = max(0, mean of rho over mismatched rows), KTO's estimate of KL(policy || reference).

    Biased, as the paper says (arXiv 2402.01306). Log-probs of whole responses, (N,) nats, of all the
    step's mismatched rows -> 0-dim, constant; 0 for N = 0.
    """
    rho = (policy_mismatched - ref_mismatched).detach().double()
    return (rho.sum() / max(rho.numel(), 1)).clamp(min=0)


def with_kto_baseline(batch: Batch, mismatched_batch: Batch, policy_logprobs: torch.Tensor) -> Batch:
    """The batch with `baselines` (B,) = z0 of `mismatched_batch`, which has ref_logprobs.

    policy_logprobs (B, T') of the mismatched batch under the policy as it is when the update begins.
    Mismatched rows without loss tokens are left out.
    """
    assert mismatched_batch.ref_logprobs is not None, "score the mismatched batch with the reference first"
    mask = mismatched_batch.loss_mask
    counted = mask.any(-1)
    z0 = kto_baseline(
        sequence_logprobs(policy_logprobs, mask)[counted],
        sequence_logprobs(mismatched_batch.ref_logprobs, mask)[counted],
    )
    return batch.replace(baselines=z0.to(policy_logprobs.dtype).expand(len(batch)).clone())


@torch.no_grad()
def with_bco_baseline(batch: Batch, policy_logprobs: torch.Tensor) -> Batch:
    """The batch with `baselines` (B,) = d, the mean over both labels of each one's mean rho.

    policy_logprobs (B, T) of the whole step's batch, under the policy as it is when the update begins. The
    BCO paper (arXiv 2404.04656) keeps a moving average over steps instead. A label without rows is left out
    of the mean.
    """
    assert batch.ref_logprobs is not None and batch.labels is not None
    counted = batch.loss_mask.any(-1)
    rho = _log_ratio(batch, policy_logprobs)
    sides = [rho[(side & counted)] for side in (batch.labels > 0, batch.labels < 0)]
    means = [side.mean() for side in sides if len(side)]
    delta = torch.stack(means).mean() if means else rho.new_zeros(())
    return batch.replace(baselines=delta.to(policy_logprobs.dtype).expand(len(batch)).clone())


def _prompt_lengths(batch: Batch) -> torch.Tensor:
    """(B,) int64, tokens before the first of response_mask; the whole row where there is none."""
    first = batch.response_mask.int().argmax(-1)
    return torch.where(batch.response_mask.any(-1), first, batch.lengths)


def _log_ratio(batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
    return sequence_logprobs(logprobs, batch.loss_mask) - sequence_logprobs(
        batch.ref_logprobs, batch.loss_mask
    )


def _log_ratio_and_sums(batch: Batch, logprobs: torch.Tensor, beta: float) -> tuple[torch.Tensor, Sums]:
    """rho (B,) with gradient, and the sums but for the loss."""
    for name, source in (
        ("labels", "rlhf.batching.make_label_batch"),
        ("ref_logprobs", "scoring with the reference"),
        ("baselines", "rlhf.kto.with_kto_baseline or with_bco_baseline"),
    ):
        if getattr(batch, name) is None:
            raise ValueError(f"a loss on labelled responses needs {name}, from {source}")
    rho = _log_ratio(batch, logprobs)
    counted = batch.loss_mask.any(-1)
    desirable, undesirable = counted & (batch.labels > 0), counted & (batch.labels < 0)
    constant = rho.detach()
    policy = sequence_logprobs(logprobs.detach(), batch.loss_mask)
    return rho, {
        "num_sequences": counted.sum().double(),
        "num_desirable": desirable.sum().double(),
        "num_undesirable": undesirable.sum().double(),
        "kto/reward_desirable": beta * constant[desirable].sum(),
        "kto/reward_undesirable": beta * constant[undesirable].sum(),
        "kto/logprob_desirable": policy[desirable].sum(),
        "kto/logprob_undesirable": policy[undesirable].sum(),
        "kto/baseline": batch.baselines.double()[counted].sum(),
    }


def _finish(batch: Batch, losses: torch.Tensor, sums: Sums, dtype: torch.dtype) -> tuple[torch.Tensor, Sums]:
    counted = batch.loss_mask.any(-1)
    total = torch.where(counted, losses, 0.0).sum()
    share = (total / max(batch.num_loss_sequences, 1)).to(dtype)
    return share, {"kto/loss": share.detach().double(), **sums}
