"""Log-probabilities of given tokens from hidden states: the head and the log-softmax together, in chunks of rows.

Here: `linear_logprobs`, with which no (M, V) tensor lives in memory, forward or backward: a chunk's logits are made,
read and forgotten, and made again in the backward. Its values are those of `rlhf.kernels.linear` followed by
`rlhf.kernels.logprob`, bit for bit where the linear is packed (`reference` is these two calls). Not here: which
rows are wanted and which head there is (`rlhf.models.head`). On CUDA linear_logprob_triton.py runs, without logits in
memory even for a chunk in the forward, and cuts the vocabulary into chunks in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rlhf.kernels import gpu, native
from rlhf.kernels.first_order import first_order
from rlhf.kernels.form import ONEDNN, TORCH, TRITON, took
from rlhf.kernels.linear import linear
from rlhf.kernels.logprob import (
    Rows,
    Temperature,
    check_rows,
    check_temperature,
    of_rows,
    slope_factors,
    slopes,
    token_logprobs,
    token_rows,
)

_CPU_CHUNK_ELEMENTS = 1 << 20  # logits of one chunk: what a core's caches nearly hold
_GPU_CHUNK_ELEMENTS = 1 << 26  # where no Triton form runs
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
    gives them. Raises ValueError for shapes, dtypes and devices that do not fit, and a temperature that is not > 0 (of a
    tensor on a CPU).
    """
    _check(hidden, weight, targets, temperature, bias)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if gpu.serves(*inputs) and gpu.holds_tiles(hidden) and all(x.numel() for x in inputs):
        from rlhf.kernels import linear_logprob_triton

        took("log-probs of a head", TRITON)
        run = _OnGpu.apply if needs_grad else linear_logprob_triton.linear_logprobs
        return run(hidden, weight, bias, targets, temperature, entropy)[:2]
    took("log-probs of a head", TORCH if packed is None else ONEDNN)
    if needs_grad:
        return _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, packed, entropy)
    return _forward(hidden, weight, bias, targets, temperature, packed, entropy, needs_slopes=False)[:2]


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
    check_rows("hidden", hidden, targets, temperature)
    check_temperature(temperature)
    if isinstance(temperature, torch.Tensor) and temperature.is_cpu and native.plain(temperature):
        if not bool((temperature > 0).all()):  # elsewhere reading it would wait for the device
            raise ValueError(
                f"temperature {temperature.tolist()} for hidden {tuple(hidden.shape)}: all must be > 0"
            )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}; it must be of a float dtype")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} and hidden on {hidden.device}; move one of them")
        if x is not None and x.dtype != hidden.dtype:
            raise ValueError(f"{name} is {x.dtype} and hidden {hidden.dtype}; they must be the same")


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
    *,
    needs_slopes: bool,
) -> Rows:
    vocabulary = weight.shape[0]
    with torch.no_grad():
        parts = [
            token_rows(
                linear(hidden[part], weight, bias, packed), targets[part], of_rows(temperature, part), entropy,
                needs_slopes=needs_slopes,
            )
            for part in _chunks(hidden, vocabulary)
        ]  # fmt: skip
        if not parts:
            return token_rows(
                hidden.new_empty(0, vocabulary), targets, temperature, entropy, needs_slopes=needs_slopes
            )
        return Rows(*(None if of_parts[0] is None else torch.cat(of_parts) for of_parts in zip(*parts)))


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
        rows = _forward(hidden, weight, bias, targets, temperature, packed, entropy, needs_slopes=True)
        ctx.save_for_backward(hidden, weight, bias, targets, *rows)
        ctx.temperature, ctx.packed = temperature, packed
        ctx.set_materialize_grads(False)
        return rows.logprobs, rows.entropies

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        # With z the logits and p their softmax at T: d logp_t / dz_j = ([j = t] - p_j) / T; then through the
        # linear as usual.
        hidden, weight, bias, targets, *rows = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad, grad_entropy = slope_factors(grad, grad_entropy, rows[0], ctx.temperature)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if of_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=weight.device) if of_bias else None
        for part in _chunks(hidden, weight.shape[0]):
            logits = linear(hidden[part], weight, bias, ctx.packed)
            *of_part, of_entropy = (
                None if x is None else x[part] for x in (targets, *rows, grad, grad_entropy)
            )
            slope = slopes(
                logits, of_part[0], of_rows(ctx.temperature, part), Rows(*of_part[1:-1]), of_part[-1], of_entropy,
                out=logits,
            )  # fmt: skip
            if grad_bias is not None:
                grad_bias += slope.sum(0, dtype=wide)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, slope.t(), hidden[part])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            *(None,) * 4,
        )


class _OnGpu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: Temperature,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from rlhf.kernels import linear_logprob_triton

        rows = linear_logprob_triton.linear_logprobs(hidden, weight, bias, targets, temperature, entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, *rows)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an entropy that is only measured costs nothing in the backward
        return rows.logprobs, rows.entropies

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        from rlhf.kernels import linear_logprob_triton, logprob_triton

        hidden, weight, bias, targets, *of_rows = ctx.saved_tensors
        gradients = linear_logprob_triton.gradients(
            hidden, weight, bias, targets, ctx.temperature, logprob_triton.Rows(*of_rows), grad, grad_entropy,
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *gradients, None, None, None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b; chunks are added up in fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
