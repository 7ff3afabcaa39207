"""Log-probabilities of given tokens from hidden states: the head and the log-softmax together, in chunks of rows.

Here: `linear_logprobs`, with which no (M, V) tensor lives in memory, forward or backward: a chunk's logits are made,
read and forgotten, and made again in the backward. Its values are those of `rlhf.kernels.linear` followed by
`rlhf.kernels.logprob`, bit for bit where the linear is packed (`reference` is these two calls). Not here: which
rows are wanted and which head there is (`rlhf.models.head`). The same torch operations serve CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rlhf.kernels.first_order import first_order
from rlhf.kernels.linear import linear
from rlhf.kernels.logprob import (
    Temperature,
    entropy_slopes,
    log_softmax,
    of_rows,
    row_entropies,
    scaled_logits,
    token_logprobs,
)

_CPU_CHUNK_ELEMENTS = 1 << 20  # logits of one chunk: what a core's caches nearly hold
_GPU_CHUNK_ELEMENTS = 1 << 26
_MIN_CHUNK_ROWS = 128  # fewer and the products with the weight are slow


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: Temperature = 1.0,
    *,
    bias: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) under softmax((hidden weight^T + bias) / temperature) and, if asked, the entropy of each row's
    distribution.

    hidden (M, H), weight (V, H), bias (V,), targets (M,) int64; `packed` is `rlhf.kernels.linear.pack(weight)`;
    temperature > 0, a number or (M,) -> logprobs (M,), entropy (M,) or None, nats, fp32 (fp64 for fp64 inputs), with
    gradients to hidden, weight and bias. The softmax is taken in fp32; logits are of the inputs' dtype, as the head
    gives them. Raises ValueError for shapes, dtypes and devices that do not fit, and a temperature that is not > 0.
    """
    _check(hidden, weight, targets, temperature, bias)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, packed, entropy)
    return _forward(hidden, weight, bias, targets, temperature, packed, entropy)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: Temperature = 1.0,
    *,
    bias: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`linear_logprobs` by way of all the logits."""
    return token_logprobs(linear(hidden, weight, bias, packed), targets, temperature, entropy)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: Temperature,
    bias: torch.Tensor | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (M, H) and (V, H)"
        )
    of_row, of_token = hidden.shape[:1], weight.shape[:1]
    for name, x, shape in (("targets", targets, of_row), ("bias", bias, of_token)):
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{name} {tuple(x.shape)} must be {tuple(shape)} beside hidden {tuple(hidden.shape)} and weight "
                f"{tuple(weight.shape)}"
            )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}; they must be token ids, int64")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}; it must be of a float dtype")
    for name, x in (("weight", weight), ("bias", bias), ("targets", targets)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} and hidden on {hidden.device}; move one of them")
        if x is not None and x is not targets and x.dtype != hidden.dtype:
            raise ValueError(f"{name} is {x.dtype} and hidden {hidden.dtype}; they must be the same")
    if isinstance(temperature, torch.Tensor):
        if temperature.shape != of_row:
            raise ValueError(
                f"temperature {tuple(temperature.shape)} must be a number or {tuple(of_row)}, one for each row of "
                f"hidden {tuple(hidden.shape)}"
            )
    elif not temperature > 0:
        raise ValueError(
            f"temperature={temperature} must be > 0; for greedy decoding take the argmax of the logits"
        )


def _chunks(hidden: torch.Tensor, vocabulary: int) -> Iterator[slice]:
    elements = _CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    rows = max(_MIN_CHUNK_ROWS, elements // max(1, vocabulary) // _MIN_CHUNK_ROWS * _MIN_CHUNK_ROWS)
    for start in range(0, hidden.shape[0], rows):
        yield slice(start, start + rows)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: Temperature,
    packed: torch.Tensor | None,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logprobs = torch.empty(targets.shape, dtype=dtype, device=hidden.device)
    entropies = torch.empty_like(logprobs) if entropy else None
    with torch.no_grad():
        for rows in _chunks(hidden, weight.shape[0]):
            chunk = log_softmax(linear(hidden[rows], weight, bias, packed), of_rows(temperature, rows))
            logprobs[rows] = chunk.gather(1, targets[rows, None])[:, 0]
            if entropies is not None:
                entropies[rows] = row_entropies(chunk)
    return logprobs, entropies


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: Temperature,
        packed: torch.Tensor | None,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logprobs, entropies = _forward(hidden, weight, bias, targets, temperature, packed, entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies)
        ctx.temperature, ctx.packed = temperature, packed
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        # With z the logits and p their softmax at T: d logp_t / dz_j = ([j = t] - p_j) / T; then through the
        # linear as usual.
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad = torch.zeros(targets.shape, dtype=wide, device=hidden.device) if grad is None else grad
        grad = grad / ctx.temperature
        if grad_entropy is not None:
            grad_entropy = grad_entropy / ctx.temperature if grad_entropy.any() else None
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if of_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=weight.device) if of_bias else None
        for rows in _chunks(hidden, weight.shape[0]):
            logits = linear(hidden[rows], weight, bias, ctx.packed)
            scaled = scaled_logits(logits, of_rows(ctx.temperature, rows))
            if grad_entropy is None:
                slope = torch.softmax(scaled, -1).mul_(-grad[rows, None])
            else:
                slope = torch.log_softmax(scaled, -1)
                spread = entropy_slopes(slope, entropies[rows]).mul_(grad_entropy[rows, None])
                slope = slope.exp_().mul_(-grad[rows, None]).add_(spread)
                del spread
            slope.scatter_add_(1, targets[rows, None], grad[rows, None])
            del logits, scaled
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, slope.t(), hidden[rows])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            *(None,) * 4,
        )


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b; chunks are added up in fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
