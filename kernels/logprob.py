"""Log-probabilities of given tokens from logits: one function for the trainer and the sampler.

Here: log softmax of logits / temperature in fp32, the entry of a target token, the entropy. A row depends on
its own logits only, so the sampler's numbers equal the trainer's. Not here: which logits belong to which
token (`rlhf.logprobs`), sampling (`rlhf.kernels.sampling`). The same torch operations serve CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_CHUNK_ELEMENTS = 1 << 24  # rows are worked on in chunks of at most this many logits


Temperature = float | torch.Tensor  # > 0; a tensor (M,) holds one for each row


def log_softmax(logits: torch.Tensor, temperature: Temperature = 1.0) -> torch.Tensor:
    """(M, V) logits of any float dtype -> (M, V) fp32 (fp64 stays) log-probabilities, nats, at
    `temperature`.
    """
    return torch.log_softmax(scaled_logits(logits, temperature), -1)


def scaled_logits(logits: torch.Tensor, temperature: Temperature) -> torch.Tensor:
    """(M, V) fp32 (fp64 stays): logits / temperature; the very tensor where that changes nothing."""
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    if isinstance(temperature, torch.Tensor):
        return scaled / temperature.to(scaled.dtype)[:, None]
    return scaled if temperature == 1.0 else scaled / temperature


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: Temperature = 1.0, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) and, if asked, the entropy of each row's distribution at `temperature` (constant, no
    gradient).

    logits (M, V), targets (M,) int64 -> logprobs (M,) fp32, entropy (M,) fp32 or None, nats; both
    differentiable. The backward recomputes the softmax from the logits, so beside the logits and their
    gradient nothing of size (M, V) is kept. Raises ValueError for wrong shapes and for a number as
    temperature that is not > 0.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must be (M, V) and (M,)"
        )
    if not isinstance(temperature, torch.Tensor) and not temperature > 0:
        raise ValueError(
            f"temperature={temperature} must be > 0; for greedy decoding take the argmax of the logits"
        )
    run = _TokenLogprobs.apply if torch.is_grad_enabled() and logits.requires_grad else _token_logprobs
    logprobs, entropies = run(logits, targets, temperature, entropy)
    return logprobs, entropies if entropy else None


def row_entropies(logprobs: torch.Tensor) -> torch.Tensor:
    """(M, V) log-probs, which are spoilt, -> (M,) -sum p log p, where tokens of probability 0 have no part.
    torch.special.entr takes its logarithms one by one: longer than the products that make the logits."""
    finite = logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)
    return finite.exp().mul_(finite).sum(-1).neg_()


def entropy_slopes(logprobs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """(M, V) dH / dz_j = -p_j (log p_j + H) from log-probs and entropies (M,)."""
    finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
    return finite.exp().neg_().mul_(finite.add_(entropies[:, None]))


def of_rows(temperature: Temperature, rows: slice) -> Temperature:
    """The temperature of some of the rows."""
    return temperature[rows] if isinstance(temperature, torch.Tensor) else temperature


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


def _token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: Temperature, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(M,) log-probs and (M,) entropies, zeros where these are not asked for."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    entropies = torch.zeros_like(logprobs)
    for rows in _chunks(logits):
        chunk = log_softmax(logits[rows], of_rows(temperature, rows))
        logprobs[rows] = chunk.gather(1, targets[rows, None])[:, 0]
        if entropy:
            entropies[rows] = row_entropies(chunk)
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: Temperature, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies = _token_logprobs(logits, targets, temperature, entropy)
        ctx.save_for_backward(logits, targets, entropies)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an entropy that is only measured costs nothing in the backward
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        # d logp_t / dz_j = [j = t] - p_j
        logits, targets, entropies = ctx.saved_tensors
        grad = torch.zeros_like(entropies) if grad is None else grad
        grad_logits = torch.empty_like(logits)
        for rows in _chunks(logits):
            temperature = of_rows(ctx.temperature, rows)
            chunk = log_softmax(logits[rows], temperature)
            slope = None if grad_entropy is None else entropy_slopes(chunk, entropies[rows])
            probs, target = chunk.exp_(), targets[rows, None]
            out = probs * -grad[rows, None]
            out.scatter_add_(1, target, grad[rows, None])
            if slope is not None:
                out.addcmul_(slope, grad_entropy[rows, None])
            grad_logits[rows] = out.div_(
                temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
            )
        return grad_logits, None, None, None
