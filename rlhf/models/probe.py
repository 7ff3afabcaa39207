"""Does this machine keep the promise that the engine's log-probs equal the trainer's, bit for bit?

The kernels' exactness rests on how this machine's matrix products treat rows, which no specification
guarantees. Here: a few short forwards of the very model, each way the framework runs it, compared. Where one
bit differs the claim is withdrawn, nothing else. Not here: what a run does then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rlhf.kernels.attention import TILE
from rlhf.kernels.logprob import log_softmax
from rlhf.models.attention import PagedContext, kv_shapes, packed_attention
from rlhf.models.fused import StepForward

_PAGE = 64


@dataclass(frozen=True)
class ExactnessReport:
    exact: bool
    max_abs_diff: float  # nats, over all compared log-probs; 0 where exact
    detail: str  # one sentence for people


@dataclass(frozen=True)
class _Packed:
    cu_seqlens: torch.Tensor


def probe_exactness(model: nn.Module, lengths: Sequence[int] = (TILE + 5, 17, 5, 2)) -> ExactnessReport:
    """Compare every token's log-probs from one packed forward with those from sequences alone, several copies
    at once, chunked prefill, and decoding one token at a time. `model` is prepared (`rlhf.models.load`) and
    is left as it was.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().weight.shape[0]
    prompts = [torch.randint(vocab, (n,), generator=generator).to(model.device) for n in lengths]
    with torch.no_grad():
        expected = _packed_logprobs(model, prompts)
        worst, where = 0.0, ""
        for name, row, start, got in _ways(model, prompts):
            want = expected[row][start : start + len(got)]
            if not torch.equal(want, got):
                difference = (want - got).abs().max().item()
                worst, where = max(worst, difference), where or f"{name}, sequence of {lengths[row]} tokens"
    if not where:
        return ExactnessReport(True, 0.0, "packed, alone, chunked and decoded log-probs are bitwise equal")
    return ExactnessReport(False, worst, f"log-probs differ by up to {worst:.2e} nats, first in: {where}")


def _ways(model: nn.Module, prompts: list[torch.Tensor]) -> Iterator[tuple[str, int, int, torch.Tensor]]:
    """(name of the way, sequence, its first compared token, log-probs (tokens, V)) for each way to run the
    model.
    """
    yield "alone", 1, 0, _packed_logprobs(model, prompts[1:2])[0]
    yield "many copies", 0, 0, _packed_logprobs(model, prompts[:1] * 8)[7]
    pages = _Pages(model, prompts)
    whole = [len(p) for p in prompts]
    first = [max(1, n // 3) for n in whole]
    nearly = [max(a, n - 1) for a, n in zip(first, whole)]
    for begin, end in (([0] * len(whole), first), (first, nearly), (nearly, whole)):
        name = "decode" if end is whole else "chunked prefill"
        rows = [i for i, (a, b) in enumerate(zip(begin, end)) if b > a]
        for row, got in zip(rows, pages.run(rows, begin, end)):
            yield name, row, begin[row], got
    for row in range(len(prompts)):  # again, one sequence at a time
        yield "decode alone", row, nearly[row] - (nearly[row] == whole[row]), pages.last(row)


def _packed_logprobs(model: nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """(n, V) fp32 for each prompt, from one packed forward."""
    lengths = [len(p) for p in prompts]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    positions = _positions([range(n) for n in lengths], prompts[0].device)
    with packed_attention(_Packed(torch.tensor(ends, device=prompts[0].device))):
        output = model(input_ids=torch.cat(prompts)[None], position_ids=positions[None], use_cache=False)
    return list(log_softmax(output.logits[0]).split(lengths))


def _positions(spans: list[range], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(s.start, s.stop) for s in spans]).to(device)


class _Pages:
    """A cache of its own for the probe's prompts, pages of the sequences interleaved; the model runs as the engine
    runs it."""

    def __init__(self, model: nn.Module, prompts: list[torch.Tensor]) -> None:
        self.model, self.prompts, self.forward = model, prompts, StepForward(model)
        width = -(-max(map(len, prompts)) // _PAGE)
        self.table = np.arange(width * len(prompts)).reshape(width, -1).T
        shapes = [(width * len(prompts), heads, _PAGE, k, v) for heads, k, v in kv_shapes(model)]
        options = {"dtype": model.dtype, "device": model.device}
        self.k = [torch.zeros(p, h, t, k, **options) for p, h, t, k, _ in shapes]
        self.v = [torch.zeros(p, h, t, v, **options) for p, h, t, _, v in shapes]

    def run(self, rows: list[int], begin: list[int], end: list[int]) -> list[torch.Tensor]:
        """Log-probs of tokens begin..end of the given sequences, whose earlier tokens are in the pages."""
        spans = [range(begin[r], end[r]) for r in rows]
        places = [(self.table[r], np.arange(s.start, s.stop)) for r, s in zip(rows, spans)]
        slots = [table[at // _PAGE] * _PAGE + at % _PAGE for table, at in places]
        context = PagedContext(
            k_pages=self.k,
            v_pages=self.v,
            slots=torch.from_numpy(np.concatenate(slots)).to(self.model.device),
            page_table=self.table[rows],
            context_lens=[s.stop for s in spans],
            query_starts=np.concatenate([[0], np.cumsum([len(s) for s in spans])]),
        )
        tokens = torch.cat([self.prompts[r][s.start : s.stop] for r, s in zip(rows, spans)])
        logits = self.forward(tokens, _positions(spans, tokens.device), context)
        return list(log_softmax(logits).split([len(s) for s in spans]))

    def last(self, row: int) -> torch.Tensor:
        """The last token of one sequence once more, alone."""
        n = len(self.prompts[row])
        begin, end = [n - 1] * len(self.prompts), [n] * len(self.prompts)
        return self.run([row], begin, end)[0]
