"""Products with weights on a GPU, whose rows do not depend on how many there are, and the log-probs that come of the head's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.measure import DEVICE, TOLERANCES, Check, Timing, close, kind, made, same, time_ms
from rlhf.kernels import linear_logprob_triton, logprob_triton, matmul_triton
from rlhf.kernels.linear import can_join, joined_linear, linear
from rlhf.kernels.linear_logprob import linear_logprobs
from rlhf.kernels.logprob import token_logprobs

GOALS = {
    "linear, of F.linear's rate": 0.80,
    "linear, weight's bytes": 0.80,  # of a copy's bandwidth
    "linear_logprobs, of F.linear's rate": 1 / 1.1,
}
_MEMORY = 0.1  # of the logits: most that log-probs may take beside the gradients, backward included
_JOINED = (((4096, 1024, 1024), 4096), ((12288, 12288), 4096), ((2048, 1024, 1024), 1024))  # outs, in
_WEIGHTS = ((12288, 4096), (4096, 4096), (4096, 12288), (151936, 1024))  # (out, in)


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    products = {  # rows, out, in
        "large": (1024, 4096, 1024),
        "large, segments": (1024, 4096, 4096),
        "small, segments": (512, 4096, 4096),
        "decode, shared out": (8, 4096, 4096),
        "decode, wide": (8, 16384, 512),
        "decode, narrow": (8, 512, 512),
    }
    for name, (rows, columns, inner) in products.items():
        x, w, b = (torch.zeros(s, dtype=dtype) for s in ((rows, inner), (columns, inner), (columns,)))
        yield f"linear {name}", lambda x=x, w=w, b=b: matmul_triton.linear(x, w, b)
        if dtype == torch.float16:
            return  # the others are bf16's with an instruction of another name
    targets, grad = torch.zeros(64, dtype=torch.long), torch.zeros(64)
    logits = torch.zeros(64, 1024, dtype=dtype)
    head, hidden = torch.zeros(1024, 1024, dtype=dtype), torch.zeros(64, 1024, dtype=dtype)
    rows_of = logprob_triton.Rows(grad, grad, grad, grad)
    for temperature, entropy in ((0.7, True), (1.0, False)):
        about = " with entropy" if entropy else ""
        yield (
            f"linear_logprobs{about}",
            lambda t=temperature, e=entropy: linear_logprob_triton.linear_logprobs(
                hidden, head, None, targets, t, e
            ),
        )
        yield (
            f"token_logprobs{about}",
            lambda t=temperature, e=entropy: logprob_triton.token_logprobs(logits, targets, t, e),
        )
        yield (
            f"token_logprobs backward{about}",
            lambda t=temperature, e=entropy: logprob_triton.gradient(
                logits, targets, t, rows_of, grad, grad if e else None
            ),
        )


def checks(quick: bool) -> Iterator[Check]:
    for dtype, tolerance in TOLERANCES.items():
        yield from _values(dtype, tolerance, quick)
        yield from _bits(dtype, quick)
        yield from _joined_bits(dtype, quick)
        yield from _logprob_bits(dtype, quick)
    if DEVICE != "cpu" and not quick:
        yield _memory(8192, 151936, 1024)


def timings(top: dict[str, float]) -> Iterator[Timing]:
    for columns, inner in (*_WEIGHTS, (151936, 4096)):
        weight = made(columns, inner)
        for rows in (1, 16, 64, 1024, 4096, 8192):
            yield _product(top, rows, weight)
        for rows in (1024, 8192):
            if columns > 100_000:
                yield from _logprobs(rows, weight)
        del weight
    for outs, inner in _JOINED:
        for rows in (1, 16, 64):
            yield _joined(top, rows, outs, inner)


def _values(dtype: torch.dtype, tolerance: float, quick: bool) -> Iterator[Check]:
    shapes = [(3, 129, 100), (5, 40, 2100)]
    if not quick:
        shapes += [
            (1, 7, 33),
            (65, 129, 1),
            (64, 4096, 4096),
            (1024, 4096, 4096),
            (700, 9000, 1000),
            (4, 1000, 9000),
        ]
    for rows, columns, inner in shapes:
        x, w, b = (
            made(rows, inner, dtype=dtype),
            made(columns, inner, dtype=dtype, seed=1),
            made(columns, dtype=dtype),
        )
        yield from close(
            f"linear {rows} x {columns} x {inner} {kind(dtype)}", linear, x, w, b, tolerance=tolerance
        )
    rows, vocabulary, width = (5, 530, 40) if quick else (300, 5000, 512)
    hidden, head = made(rows, width, dtype=dtype), made(vocabulary, width, dtype=dtype, seed=1) * width**-0.5
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def both(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return torch.stack(linear_logprobs(hidden, head, targets, 0.7, entropy=True))

    yield from close(f"linear_logprobs {kind(dtype)}", both, hidden, head, tolerance=tolerance)


def _bits(dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """A row's bits are its own, at every number of rows."""
    most = 70 if quick else 4096
    counts = (1, 65) if quick else (1, 2, 7, 16, 17, 63, 64, 65, 128, 300, 700, 1024, 2048, 4095)
    for columns, inner in (
        ((40, 2100),) if quick else ((4096, 4096), (1024, 3072), (9000, 2500), (1000, 9000))
    ):
        x, w = made(most, inner, dtype=dtype), made(columns, inner, dtype=dtype, seed=1)
        whole = linear(x, w)
        for rows in counts:
            for first in {0, most - rows}:
                part = linear(x[first : first + rows], w)
                name = f"linear {columns} x {inner} {kind(dtype)}, {rows} rows from {first}"
                yield same(name, part, whole[first : first + rows])


def _joined_bits(dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """One product with weights one below another has the bits of each one's own."""
    for outs, inner in (((72, 40, 40), 2100),) if quick else _JOINED:
        whole = made(sum(outs), inner, dtype=dtype, seed=1)
        weights = whole.split(outs)
        name = f"joined linear {' + '.join(map(str, outs))} x {inner} {kind(dtype)}"
        yield Check(f"{name} can be", can_join(weights), "its weights are cut into segments of their own")
        for rows in (1, 5) if quick else (1, 7, 64, 65, 300, 2048):
            x = made(rows, inner, dtype=dtype)
            parts = torch.cat([linear(x, w) for w in weights], -1)
            yield same(f"{name}, {rows} rows", joined_linear(x, whole, None, whole=outs[0]), parts)


def _logprob_bits(dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """Log-probs from hidden states are those of the logits, at every number of rows."""
    sizes = ((600, 40),) if quick else ((151936, 1024), (5000, 4096), (32000, 4096))
    for vocabulary, width in sizes:
        rows = 5 if quick else 1030
        hidden, head = (
            made(rows, width, dtype=dtype),
            made(vocabulary, width, dtype=dtype, seed=1) * width**-0.5,
        )
        targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
        got, entropy = linear_logprobs(hidden, head, targets, 0.7, entropy=True)
        name = f"linear_logprobs {vocabulary} x {width} {kind(dtype)}"
        for count in (1, 64, rows):
            logits = linear(hidden[:count], head)
            want, wanted = token_logprobs(logits, targets[:count], 0.7, entropy=True)
            yield same(f"{name}, of {count} rows' logits", got[:count], want)
            yield same(f"{name}, entropies of {count} rows' logits", entropy[:count], wanted)
            sampled, _ = token_logprobs(logits.float() / 0.7, targets[:count])
            yield same(f"{name}, of {count} rows' scores", got[:count], sampled)


def _memory(rows: int, vocabulary: int, width: int) -> Check:
    hidden, head = made(rows, width).requires_grad_(), made(vocabulary, width, seed=1).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs, entropy = linear_logprobs(hidden, head, targets, 0.7, entropy=True)
    (logprobs + entropy).sum().backward()
    taken = torch.cuda.max_memory_allocated() - before - hidden.grad.nbytes - head.grad.nbytes
    share = taken / (rows * vocabulary * hidden.element_size())
    return Check(
        f"linear_logprobs' memory, {rows} x {vocabulary}", share <= _MEMORY, f"{share:.1%} of the logits'"
    )


def _product(top: dict[str, float], rows: int, weight: torch.Tensor) -> Timing:
    x, shape = made(rows, weight.shape[1]), f"{rows} x {weight.shape[0]} x {weight.shape[1]}"
    ms, other = time_ms(lambda: linear(x, weight)), time_ms(lambda: F.linear(x, weight))
    if rows <= 64:
        name, share = "linear, weight's bytes", weight.nbytes / ms / top["copy"]
    else:
        name, share = "linear, of F.linear's rate", other / ms
    return Timing(name, shape, ms, share, GOALS[name], "F.linear", other / ms)


def _joined(top: dict[str, float], rows: int, outs: tuple[int, ...], inner: int) -> Timing:
    x, whole = made(rows, inner), made(sum(outs), inner, seed=1)
    weights = whole.split(outs)
    ms = time_ms(lambda: joined_linear(x, whole, None, whole=outs[0]))
    apart = time_ms(lambda: [linear(x, w) for w in weights])
    shape = f"{rows} x {' + '.join(map(str, outs))} x {inner}"
    share = whole.nbytes / ms / top["copy"]
    goal = (
        GOALS["linear, weight's bytes"] if sum(outs) > 6000 else None
    )  # smaller ones are over before memory is busy
    return Timing("joined linear, weights' bytes", shape, ms, share, goal, "one by one", apart / ms)


def _logprobs(rows: int, weight: torch.Tensor) -> Iterator[Timing]:
    x, shape = made(rows, weight.shape[1]), f"{rows} x {weight.shape[0]} x {weight.shape[1]}"
    targets = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        plain = time_ms(lambda: F.linear(x, weight))
        for entropy in (False, True):
            ms = time_ms(lambda e=entropy: linear_logprobs(x, weight, targets, entropy=e))
            name = "linear_logprobs, of F.linear's rate"
            about = f"{shape}{', entropy' if entropy else ''}"
            yield Timing(name, about, ms, plain / ms, GOALS[name], "F.linear", plain / ms)
    x, weight = x.requires_grad_(), weight.detach().requires_grad_()
    ms = time_ms(lambda: linear_logprobs(x, weight, targets)[0].sum().backward(), repetitions=5)
    yield Timing(
        "linear_logprobs and backward", shape, ms, 4 * plain / ms, None, "4 F.linear", 4 * plain / ms
    )
