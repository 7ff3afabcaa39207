"""Log-probabilities of given tokens from logits: one function for the trainer and the sampler.

Here: log softmax of logits / temperature in fp32, the entry of a target token, the entropy. A row depends on
its own logits only, so the sampler's numbers equal the trainer's. Not here: which logits belong to which
token (`rlhf.logprobs`), sampling (`rlhf.kernels.sampling`). On CUDA logprob_triton.py runs, on a CPU with a C++ compiler
logprob.cpp, which writes nothing of the logits' size; elsewhere, and for fp64, torch operations. Their numbers differ by
rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from rlhf.kernels import gpu, native
from rlhf.kernels.first_order import first_order
from rlhf.kernels.form import NATIVE, TORCH, TRITON, took
from rlhf.kernels.native import address
from rlhf.kernels.threads import worth

_CHUNK_ELEMENTS = 1 << 24  # rows are worked on in chunks of at most this many logits


Temperature = float | torch.Tensor  # > 0; a tensor (M,) holds one for each row


class Rows(NamedTuple):
    """What M rows of logits gave, and what their slopes are made from; (M,) fp32, fp64 of fp64 logits."""

    logprobs: torch.Tensor
    entropies: torch.Tensor | None  # where they were asked for
    sums: torch.Tensor | None = (
        None  # (M, 2): the largest logit / temperature, the sum of e^(logit / temperature - it);
    )
    # from the native form, where slopes are wanted


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
    temperature that is not > 0, and on a CPU IndexError for a target that is no token.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must be (M, V) and (M,)"
        )
    check_temperature(temperature)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if gpu.serves(logits) and logits.numel():
        from rlhf.kernels import logprob_triton

        check_rows("logits", logits, targets, temperature)
        took("log-probs", TRITON)
        run = _OnGpu.apply if needs_grad else logprob_triton.token_logprobs
        return run(logits, targets, temperature, entropy)[:2]
    if needs_grad:
        return _TokenLogprobs.apply(logits, targets, temperature, entropy)
    rows = token_rows(logits, targets, temperature, entropy, needs_slopes=False)
    return rows.logprobs, rows.entropies


def check_rows(name: str, rows: torch.Tensor, targets: torch.Tensor, temperature: Temperature) -> None:
    """Raise ValueError for what torch's operations would refuse, and a kernel reads beyond its end. `rows` (M, any), called
    `name`, are what targets (M,) and temperatures belong to."""
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}; they must be token ids, int64")
    if isinstance(temperature, torch.Tensor) and temperature.shape != targets.shape:
        raise ValueError(
            f"temperature {tuple(temperature.shape)} must be a number or {tuple(targets.shape)}, one for each row of "
            f"{name} {tuple(rows.shape)}"
        )
    for other, x in (("targets", targets), ("temperature", temperature)):
        if isinstance(x, torch.Tensor) and x.device != rows.device:
            raise ValueError(f"{other} is on {x.device} and {name} on {rows.device}; move one of them")


def check_temperature(temperature: Temperature) -> None:
    """Raise ValueError for a number that is not > 0."""
    if not isinstance(temperature, torch.Tensor) and not temperature > 0:
        raise ValueError(
            f"temperature={temperature} must be > 0; for greedy decoding take the argmax of the logits"
        )


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


def token_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: Temperature,
    entropy: bool,
    *,
    needs_slopes: bool,
) -> Rows:
    """`token_logprobs` without gradient, on a CPU or by torch, with what `slopes` wants to know."""
    given = logits.float() if logits.dtype == torch.float16 else logits
    beside = targets, temperature if isinstance(temperature, torch.Tensor) else None
    if native.serves("logprob", 0, given) and native.plain(*beside):  # rows of any width
        check_rows("logits", given, targets, temperature)
        took("log-probs", NATIVE)
        return _native_rows(given, targets, temperature, entropy, needs_slopes)
    took("log-probs", TORCH)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    hollow = native.hollow(logits, *beside)
    logprobs = (logits if hollow is None else hollow).new_empty(targets.shape, dtype=dtype)
    entropies = torch.empty_like(logprobs) if entropy else None
    for rows in _chunks(logits):
        chunk = log_softmax(logits[rows], of_rows(temperature, rows))
        logprobs[rows] = chunk.gather(1, targets[rows, None])[:, 0]
        if entropies is not None:
            entropies[rows] = row_entropies(chunk)
    return Rows(logprobs, entropies)


def slopes(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: Temperature,
    rows: Rows,
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the logits (M, V), written to `out`, contiguous and of their dtype, which may be the logits.

    `rows` is `token_rows` of the same arguments with `needs_slopes`; grad and grad_entropy are (M,), of its log-probs and of its entropies, and
    already divided by the temperature.
    """
    # d logp_t / dz_j = [j = t] - p_j; dH / dz_j = -p_j (log p_j + H)
    if rows.sums is not None:  # which the native form gave
        return _native_slopes(logits, targets, temperature, rows, grad, grad_entropy, out)
    for part in _chunks(logits):
        scores = scaled_logits(logits[part], of_rows(temperature, part))
        if grad_entropy is None:
            slope = torch.softmax(scores, -1).mul_(-grad[part, None])
        else:
            slope = torch.log_softmax(scores, -1)
            spread = entropy_slopes(slope, rows.entropies[part]).mul_(grad_entropy[part, None])
            slope = slope.exp_().mul_(-grad[part, None]).add_(spread)
        out[part] = slope.scatter_add_(1, targets[part, None], grad[part, None])
    return out


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: Temperature, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = token_rows(logits, targets, temperature, entropy, needs_slopes=True)
        ctx.save_for_backward(logits, targets, *rows)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an entropy that is only measured costs nothing in the backward
        return rows.logprobs, rows.entropies

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        logits, targets, *rows = ctx.saved_tensors
        grads = slope_factors(grad, grad_entropy, rows[0], ctx.temperature)
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        return slopes(logits, targets, ctx.temperature, Rows(*rows), *grads, out), None, None, None


def slope_factors(
    grad: torch.Tensor | None, grad_entropy: torch.Tensor | None, like: torch.Tensor, temperature: Temperature
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a backward is given, as `slopes` wants it."""
    grad_entropy = grad_entropy if grad_entropy is not None and bool(grad_entropy.any()) else None
    grad = torch.zeros_like(like) if grad is None else grad
    if not isinstance(temperature, torch.Tensor) and temperature == 1.0:
        return grad, grad_entropy
    return grad / temperature, None if grad_entropy is None else grad_entropy / temperature


# -- the native form -----------------------------------------------------------------------------------------------------


def _native_rows(
    logits: torch.Tensor, targets: torch.Tensor, temperature: Temperature, entropy: bool, needs_slopes: bool
) -> Rows:
    targets = targets.contiguous()  # names keep what is copied alive during the call
    logits, temperatures, temperature = _given(logits, temperature)
    num_rows = len(targets)
    logprobs = torch.empty(num_rows, device="cpu")
    entropies = torch.empty(num_rows, device="cpu") if entropy else None
    sums = torch.empty(num_rows, 2, device="cpu") if needs_slopes else None
    bad = ctypes.c_int64()
    native.function("logprob", "logprob_forward")(
        logits.data_ptr(), targets.data_ptr(), address(temperatures), logprobs.data_ptr(), address(entropies),
        address(sums), ctypes.addressof(bad), *logits.shape, logits.stride(0), temperature,
        logits.dtype == torch.bfloat16, worth(logits.numel()),
    )  # fmt: skip
    if bad.value >= 0:
        raise IndexError(
            f"targets[{bad.value}] = {int(targets[bad.value])} is no token of logits {tuple(logits.shape)}"
        )
    return Rows(logprobs, entropies, sums)


def _native_slopes(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: Temperature,
    rows: Rows,
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    if logits.dtype == torch.float16:
        wide = logits.float()
        return out.copy_(_native_slopes(wide, targets, temperature, rows, grad, grad_entropy, wide))
    logits, temperatures, temperature = _given(logits, temperature)
    targets, grad = targets.contiguous(), grad.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    given = (logits, targets, temperatures, rows.sums, rows.entropies, grad, grad_entropy, out)
    native.function("logprob", "logprob_slopes")(
        *map(address, given), *logits.shape, logits.stride(0), temperature, logits.dtype == torch.bfloat16,
        worth(logits.numel()),
    )  # fmt: skip
    return out


def _given(logits: torch.Tensor, temperature: Temperature) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Logits whose rows lie together, a temperature for each row or None, and the one of all."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if isinstance(temperature, torch.Tensor):
        return logits, temperature.to(torch.float32).contiguous(), 1.0
    return logits, None, temperature


# -- the Triton form -----------------------------------------------------------------------------------------------------


class _OnGpu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: Temperature, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from rlhf.kernels import logprob_triton

        rows = logprob_triton.token_logprobs(logits, targets, temperature, entropy)
        ctx.save_for_backward(logits, targets, *rows)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return rows.logprobs, rows.entropies

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        from rlhf.kernels import logprob_triton

        logits, targets, *of_rows = ctx.saved_tensors
        rows = logprob_triton.Rows(*of_rows)
        return (
            logprob_triton.gradient(logits, targets, ctx.temperature, rows, grad, grad_entropy),
            None,
            None,
            None,
        )
