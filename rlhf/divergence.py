"""Distances between a teacher's and a student's next-token distributions, and the losses of distillation.

Here: KL both ways and the generalised Jensen-Shannon divergence, on whole distributions or on the teacher's
likeliest tokens with one bucket for the rest; the teacher's top-k; the loss; the advantage of on-policy
distillation; the collision entropy. Not here: which logits belong to which token (`rlhf.logprobs`).

Nothing of size (M, V) is kept beside the logits and their gradient: rows are worked on in chunks, and the
backward computes each chunk again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from rlhf.kernels.logprob import log_softmax
from rlhf.records import Batch

Sums = dict[str, torch.Tensor]

_CHUNK_ELEMENTS = 1 << 22  # logits worked on at a time: 16 MiB in fp32, a few of which live at once


# -- divergences of log-probs: teacher, student (m, n) -> (m,) nats ----------------------------------------


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) = sum_v p (log p - log q): the student covers all that the teacher says."""
    return _kl(teacher, student)


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher): the student says only what the teacher might (MiniLLM, arXiv 2306.08543)."""
    return _kl(student, teacher)


def jsd(teacher: torch.Tensor, student: torch.Tensor, *, jsd_beta: float) -> torch.Tensor:
    """b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q: p the teacher, q the student, b = `jsd_beta`.

    Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649 eq. 1). As b goes to 0 (1), divided by b (1
    - b) it becomes the forward (reverse) KL; the ends themselves would be 0 everywhere. TRL takes the KL
    there: choose it by its name. Raises ValueError for b outside (0, 1).
    """
    if not 0 < jsd_beta < 1:
        raise ValueError(f"jsd_beta={jsd_beta} must be in (0, 1); at the ends use forward_kl or reverse_kl")
    middle = torch.logaddexp(teacher + math.log(jsd_beta), student + math.log1p(-jsd_beta))
    return jsd_beta * _kl(teacher, middle) + (1 - jsd_beta) * _kl(student, middle)


DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


# -- from logits -------------------------------------------------------------------------------------------


def logits_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    divergence: str,
    temperature: float,
    jsd_beta: float,
) -> torch.Tensor:
    """The divergence of every row's softmax(logits / temperature), teacher's against student's.

    Both (M, V) -> (M,) fp32 (fp64 stays), nats; differentiable in the student's, not in the teacher's. Raises
    ValueError for an unknown name, other shapes, or a temperature that is not above 0.
    """
    measure = _measure(divergence, temperature, jsd_beta)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}: "
            "they must have one vocabulary; distil from a teacher with the student's tokenizer"
        )

    def of_rows(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        teacher = log_softmax(teacher_logits[rows], temperature)
        return measure(teacher, log_softmax(logits, temperature))

    return _ChunkedRows.apply(student_logits, of_rows)


def topk_divergence(
    student_logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    divergence: str,
    temperature: float,
    jsd_beta: float,
) -> torch.Tensor:
    """The divergence over K + 1 outcomes: the teacher's K likeliest tokens, and any other.

    student_logits (M, V); teacher_ids (M, K) int64 and teacher_logprobs (M, K + 1) nats at the same temperature,
    from `teacher_top_k` -> (M,) fp32 (fp64 stays), nats. Merging outcomes never makes a divergence larger:
    this is a lower bound of the whole one, and a proper divergence between what was kept. (Renormalising the
    K, as is often done, ignores how much the student puts elsewhere.) Differentiable in the student's logits.
    """
    measure = _measure(divergence, temperature, jsd_beta)
    rows, kept = teacher_ids.shape
    if teacher_logprobs.shape != (rows, kept + 1) or rows != len(student_logits):
        raise ValueError(
            f"teacher_ids {tuple(teacher_ids.shape)}, teacher_logprobs {tuple(teacher_logprobs.shape)} and "
            f"student logits {tuple(student_logits.shape)} must be (M, K), (M, K + 1) and (M, V)"
        )

    def of_rows(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        student = log_softmax(logits, temperature)
        ids = teacher_ids[rows]
        student = torch.cat([student.gather(1, ids), _log_rest(student.scatter(1, ids, -math.inf))], -1)
        return measure(teacher_logprobs[rows].to(student.dtype), student)

    return _ChunkedRows.apply(student_logits, of_rows)


@torch.no_grad()
def teacher_top_k(
    logits: torch.Tensor, *, top_k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (M, K) int64 of each row's likeliest tokens at `temperature`, best first, and log-probs (M, K + 1) fp32 of
    these and of any other token.

    logits (M, V); K is `top_k`, or V where that is less: then there is no other, and its log-prob is that of nothing.
    The last is summed over the others, since 1 - (the sum of the first) loses a tail below 1e-7 in fp32.
    """
    kept = min(top_k, logits.shape[1])
    ids = torch.empty(len(logits), kept, dtype=torch.long, device=logits.device)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.empty(len(logits), kept + 1, dtype=dtype, device=logits.device)
    for rows in _chunks(logits):
        every = log_softmax(logits[rows], temperature)
        logprobs[rows, :kept], ids[rows] = every.topk(kept, dim=-1)
        logprobs[rows, kept:] = _log_rest(every.scatter_(1, ids[rows], -math.inf))
    return ids, logprobs


@torch.no_grad()
def collision_entropy(logits: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """-log sum_v p(v)^2 of each row's softmax(logits / temperature): (M, V) -> (M,) fp32, nats, constant.

    Renyi's entropy of order 2: what a token drawn from p has as -log p on average, up to Jensen's inequality.
    WPO aligns its weights with it (`rlhf.preference.wpo_weights`).
    """
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in _chunks(logits):
        out[rows] = -(2 * log_softmax(logits[rows], temperature)).logsumexp(-1).float()
    return out


# -- distillation ------------------------------------------------------------------------------------------


def distill_loss(
    batch: Batch,
    logprobs: torch.Tensor | None,
    divergences: torch.Tensor,
    *,
    temperature: float,
    nll_coef: float,
) -> tuple[torch.Tensor, Sums]:
    """Mean over the step's loss tokens of temperature^2 * divergence - nll_coef * log p(token).

    divergences (B, T) at `temperature` and logprobs (B, T) at temperature 1, token-aligned, nats, with
    gradient; logprobs None on the student's own responses, which are no data: there is no NLL then. Gradients at
    temperature T are 1 / T^2 as large, hence the factor (Hinton et al., arXiv 1503.02531, where nll_coef is
    (1 - a) / a). The scalar is this micro-batch's share of the step's loss. Sums over tokens beside `num_tokens`:
    distill/divergence (without the factor), and distill/nll of data.
    """
    mask = batch.loss_mask
    divergences = torch.where(mask, divergences, 0.0)
    per_token, sums = temperature**2 * divergences, {}
    if logprobs is not None:
        nll = -torch.where(mask, logprobs, 0.0)
        sums["distill/nll"] = nll.detach().double().sum()
        if nll_coef:
            per_token = per_token + nll_coef * nll
    share = per_token.sum() / max(batch.num_loss_tokens, 1)
    return share, {
        "num_tokens": mask.sum().double(),
        "distill/loss": share.detach().double(),
        "distill/divergence": divergences.detach().double().sum(),
        **sums,
    }


def distill_advantages(
    old_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """-(log policy - log teacher) of the sampled tokens, the advantages of on-policy distillation.

    All (B, T), nats -> (B, T), constant, 0 outside the mask. On the student's own samples a policy gradient
    with these descends the reverse KL at each token, given what precedes it (no credit for later tokens:
    gamma = 0; Lu, "On-policy distillation", Thinking Machines 2025).
    """
    return torch.where(mask, teacher_logprobs - old_logprobs, 0.0).detach()


# -- inside ------------------------------------------------------------------------------------------------

_LOG_NOTHING = (
    -40.0
)  # log-prob of an outcome that cannot happen: e^-40 is nothing, and a KL with it stays finite


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sum_v e^p (p - q) along the last axis, for log-probs; a token that p rules out (-inf) adds 0."""
    impossible = p == -math.inf
    distance = torch.where(impossible, 0.0, p) - torch.where(impossible, 0.0, q)
    return (p.exp() * distance).sum(-1)


def _log_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """(m, V) log-probs, -inf where a token is kept apart -> (m, 1), of all the others together."""
    rest = logprobs.logsumexp(-1, keepdim=True)
    return torch.where(rest == -math.inf, _LOG_NOTHING, rest)


def _measure(divergence: str, temperature: float, jsd_beta: float) -> Callable[..., torch.Tensor]:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: a distribution needs one above 0")
    function = DIVERGENCES[divergence]
    return partial(function, jsd_beta=jsd_beta) if function is jsd else function


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


class _ChunkedRows(torch.autograd.Function):
    """function(logits[rows], rows) -> (m,) row by row of (M, V) logits; computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, function: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.function = function
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        out = torch.empty(len(logits), dtype=dtype, device=logits.device)
        for rows in _chunks(logits):
            out[rows] = function(logits[rows], rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _chunks(logits):
            with torch.enable_grad():
                chunk = logits[rows].detach().requires_grad_()
                (grad_logits[rows],) = torch.autograd.grad(ctx.function(chunk, rows), chunk, grad[rows])
        return grad_logits, None
