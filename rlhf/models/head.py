"""Log-probs of wanted tokens in place of logits, made inside the model's own head.

Here: the head that can do so, which models may have it, and the context that asks for it. It happens within the
head's forward because that is where its weight is whole (ZeRO-3). Not here: the arithmetic
(`rlhf.kernels.linear_logprob`), and which token is predicted where (`rlhf.logprobs`).

One forward runs at a time in a process; the current request is a module variable, not a thread-local.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from rlhf.kernels.linear_logprob import linear_logprobs
from rlhf.models.linear import InvariantLinear


@dataclass(frozen=True)
class LogprobRequest:
    """What the head is to give for a forward of (1, N) tokens: (1, M, 1) log-probs, or (1, M, 2) with entropies,
    fp32, nats."""

    sources: torch.Tensor  # (M,) int64, places among the N whose distributions are wanted
    targets: torch.Tensor  # (M,) int64, the token that each is asked about
    temperature: float  # > 0
    entropy: bool

    def answer(self, head: nn.Linear, packed: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        logprobs, entropies = linear_logprobs(
            hidden[0].index_select(0, self.sources),
            head.weight,
            self.targets,
            self.temperature,
            bias=head.bias,
            packed=packed,
            entropy=self.entropy,
        )
        return torch.stack([logprobs] if entropies is None else [logprobs, entropies], -1)[None]


@dataclass(frozen=True)
class _Trial:
    """Sends a known table through what the model does after its head."""

    table: torch.Tensor  # (1, N, V)

    def answer(self, head: nn.Linear, packed: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        return self.table


_request: LogprobRequest | _Trial | None = None


@contextmanager
def ask_head(request: LogprobRequest | _Trial) -> Iterator[None]:
    """Within it, the head of a model that `has_logprob_head` answers the request, and the model's `logits` are the
    answer. The forward must be of (1, N) tokens with logits_to_keep=0 (all)."""
    global _request
    before, _request = _request, request
    try:
        yield
    finally:
        _request = before


class _AnsweringHead(nn.Linear):
    """Beside its own forward, the answer to a request. Made by `prepare_head`, never directly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _request is None:
            return super().forward(x)
        packed = self.packed_weight() if isinstance(self, InvariantLinear) else None
        return _request.answer(self, packed, x)


class LogprobHead(_AnsweringHead, InvariantLinear):
    """For row-invariant models."""


class PlainLogprobHead(_AnsweringHead):
    """For the others."""


_CLASSES: dict[type, type] = {InvariantLinear: LogprobHead, nn.Linear: PlainLogprobHead}


def prepare_head(model: nn.Module) -> bool:
    """Let the model's head answer requests, if it is a plain linear whose result is the model's logits as it is.
    Returns whether it is. A head with an adapter, and models that cap or scale their logits (Gemma 2, Cohere,
    Granite), stay as they are. Call it when the linears are prepared and the weights whole.
    """
    head = model.get_output_embeddings()
    own = type(head)
    if own not in _CLASSES:
        return False
    head.__class__ = _CLASSES[own]
    if not _gives_what_the_head_gives(model, head):
        head.__class__ = own
        return False
    return True


def has_logprob_head(model: nn.Module) -> bool:
    """Whether `ask_head` works for this model, or for the one inside a wrapper."""
    return any(isinstance(m, _AnsweringHead) for m in model.modules())


@torch.no_grad()
def _gives_what_the_head_gives(model: nn.Module, head: nn.Linear) -> bool:
    """Tried, because no configuration says it: large and small numbers through one forward."""
    size, device = 2 * head.out_features, head.weight.device
    table = torch.linspace(-300.0, 300.0, size, device=device).to(head.weight.dtype).view(1, 2, -1)
    token_ids = torch.zeros((1, 2), dtype=torch.long, device=device)
    with ask_head(_Trial(table)):
        logits = model(
            input_ids=token_ids,
            position_ids=torch.arange(2, device=device)[None],
            logits_to_keep=0,
            use_cache=False,
        ).logits
    return logits.shape == table.shape and torch.equal(logits, table)
