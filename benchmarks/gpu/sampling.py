"""Sampling on a GPU: tokens, cuts and log-probs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.measure import DEVICE, TOLERANCES, Check, Timing, kind, made, same, time_ms, torch_forms
from rlhf.kernels import sampling_triton
from rlhf.kernels.sampling import Sampled, sample

GOAL = 0.5  # of a copy's bandwidth for one reading of the logits: a token's word takes 16 integer operations
_VOCAB = 151_936
_MOST_APART = 0.02  # of tokens in two forms, whose scores and cuts differ by rounding


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    keys, warmth = torch.zeros(64, dtype=torch.int64), torch.ones(64)
    k, p, min_p = keys, torch.ones(64, dtype=torch.float64), warmth
    for width in (512, _VOCAB):
        x = torch.zeros(64, width, dtype=dtype)
        yield f"cut {width}", lambda x=x: sampling_triton.cut(x, warmth, k, p, min_p)
    draw = functools.partial(sampling_triton.draw, x, keys, keys, warmth)
    yield "draw", lambda: draw(None)
    yield "draw cut", lambda: draw(warmth)


def parameters(rows: int, vocab: int, cut: bool) -> dict[str, torch.Tensor]:
    """What a call of `sample` gets beside the logits: of every kind of row some."""
    generator = torch.Generator().manual_seed(1)

    def pick(*values: float, dtype: torch.dtype) -> torch.Tensor:
        which = torch.randint(len(values), (rows,), generator=generator)
        return torch.tensor(values, dtype=dtype)[which].to(DEVICE)

    found = {
        "keys": torch.randint(1 << 62, (rows,), generator=generator).to(DEVICE),
        "positions": torch.arange(rows, device=DEVICE),
        "temperature": pick(0.0, 0.7, 1.0, 1.5, dtype=torch.float32),
    }
    if cut:
        found["top_k"] = pick(0, 1, 50, vocab, dtype=torch.int64)
        found["top_p"] = pick(0.1, 0.9, 0.999, 1.0, dtype=torch.float64)
        found["min_p"] = pick(0.0, 0.0, 0.05, 1.0, dtype=torch.float64)
    return found


def checks(quick: bool) -> Iterator[Check]:
    rows = 4 if quick else 256
    for dtype in TOLERANCES:
        for vocab in (5000,) if quick else (100, 512, 32_000, _VOCAB):
            for cut in (False, True):
                logits, given = 3 * made(rows, vocab, dtype=dtype), parameters(rows, vocab, cut)
                name = f"sample {vocab}{' cut' * cut} {kind(dtype)}"
                ours = sample(logits, **given)
                with torch_forms():
                    theirs = sample(logits, **given)
                yield from _alike(name, ours, theirs)
                few = 3
                part = sample(logits[:few], **{key: x[:few] for key, x in given.items()})
                for field in ("tokens", "logprobs", "processed_logprobs"):
                    whole = getattr(ours, field)[:few]
                    yield same(f"{name} {field}, {few} rows of {rows}", getattr(part, field), whole)
    yield _frequencies(300 if quick else 1_000_000)


def _alike(name: str, ours: Sampled, theirs: Sampled) -> Iterator[Check]:
    agree = ours.tokens == theirs.tokens
    apart = 1 - float(agree.float().mean())
    yield Check(
        f"{name} tokens", apart <= _MOST_APART, f"{apart:.1%} of the tokens differ from the torch form's"
    )
    for field in ("logprobs", "processed_logprobs"):
        error = float((getattr(ours, field) - getattr(theirs, field))[agree].abs().max())
        yield Check(f"{name} {field}", error <= 1e-4, f"{error:.1e} nats from the torch form's")


def _frequencies(count: int) -> Check:
    """Tokens are drawn at the rates of their probabilities."""
    vocab = 64
    logits = 1.5 * made(1, vocab, dtype=torch.float32)
    keys = torch.full((count,), 12345, device=DEVICE)
    warmth, positions = torch.ones(count, device=DEVICE), torch.arange(count, device=DEVICE)
    tokens = sample(logits.expand(count, -1), keys, positions, warmth).tokens
    wanted = count * torch.softmax(logits[0].double(), 0)
    likely = wanted > 5
    distance = ((torch.bincount(tokens, minlength=vocab) - wanted) ** 2 / wanted)[likely].sum()
    freedom = int(likely.sum()) - 1
    most = freedom + 5 * (2 * freedom) ** 0.5
    return Check(
        "sample frequencies", float(distance) < most, f"chi square {float(distance):.0f}, {most:.0f} allowed"
    )


def timings(top: dict[str, float]) -> Iterator[Timing]:
    for rows, cut in ((1, False), (16, False), (256, False), (1, True), (256, True)):
        logits, given = made(rows, _VOCAB), parameters(rows, _VOCAB, False)
        keys, positions = given["keys"], given["positions"]
        warmth = torch.ones(rows, device=DEVICE)
        k = torch.full((rows,), 50, device=DEVICE)
        p = torch.full((rows,), 0.9, dtype=torch.float64, device=DEVICE)

        def ours(logits=logits, keys=keys, positions=positions, warmth=warmth, k=k, p=p, cut=cut) -> None:
            floors = sampling_triton.cut(logits, warmth, k, p, None)[0] if cut else None
            sampling_triton.draw(logits, keys, positions, warmth, floors)

        def multinomial(logits=logits, cut=cut) -> None:
            scores = logits.float()
            if cut:
                largest, where = scores.topk(50)
                probs = torch.softmax(largest, -1)
                probs = probs.masked_fill(probs.cumsum(-1) - probs >= 0.9, 0.0)
                where.gather(1, torch.multinomial(probs, 1))
            else:
                torch.multinomial(torch.softmax(scores, -1), 1)

        ms = time_ms(ours)
        name = "sample, top-k 50, top-p 0.9" if cut else "sample"
        against = "topk, softmax, multinomial" if cut else "softmax, multinomial"
        yield Timing(
            name, f"{rows} x {_VOCAB}", ms, logits.nbytes / ms / top["copy"],
            GOAL if rows == 256 and not cut else None, against, time_ms(multinomial) / ms,
        )  # fmt: skip
