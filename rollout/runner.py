"""One forward pass of the live model over the tokens of a step, with keys and values in pages.

Here: turning a `Step` into packed tensors. Not here: how the model is run on them (`rlhf.models.fused`), attention
itself (`rlhf.models.attention`) and the choice of tokens (`rlhf.kernels.sampling`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.kernels.linear import row_bucket
from rlhf.models.adapters import Adapter, AdapterRows
from rlhf.models.attention import PagedContext
from rlhf.models.fused import StepForward
from rlhf.models.parallel import parallel_of
from rlhf.rollout.cache import KVPages
from rlhf.rollout.graphs import DecodeGraphs, DecodeStep, Recorder, serves
from rlhf.rollout.samples import Samples
from rlhf.rollout.scheduler import Chunk, Step


class Runner:
    """Runs steps on `model`, which stays the trainer's: its tensors are read, never copied."""

    def __init__(
        self, model: PreTrainedModel, pages: KVPages, bits: int | None = None, *, graphs: bool = False
    ):
        """`bits` 8 or 4: of copies of the layers' weights that the steps run from. `graphs`: record decoding steps, on a GPU."""
        self.model, self.pages = model, pages
        self.forward = StepForward(model, bits)
        self.adapters: dict[int, Adapter] = {}  # by their number
        self._parallel = parallel_of(model)
        self.graphs: DecodeGraphs | None = None
        alone = self._parallel is None and not self.forward.brings_weights  # what others send is not recorded
        if graphs and alone and serves(model):
            self.graphs = DecodeGraphs(self.forward, pages, Recorder(model.device))

    def refresh(self) -> None:
        """Take note of weights that were written in the open. Call it before a series of steps."""
        self.forward.refresh()
        if self.graphs is not None:
            self.graphs.refresh()

    def forget(self) -> None:
        """Drop what was made of the weights, after writes that leave no trace and to give the memory back."""
        self.forward.forget()
        if self.graphs is not None:
            self.graphs.forget()

    def can_decode(self, step: Step) -> bool:
        """Whether `decode` may serve the step: one new token each, and none of a model with adapters."""
        return (
            self.graphs is not None
            and not self.adapters
            and not step.chunks
            and len(step.decoding) > 0
            and not step.guesses.counts.any()
        )

    @torch.no_grad()
    def decode(self, step: Step, samples: Samples, parameters: Mapping[str, Any]) -> np.ndarray | None:
        """The draws of a step that `can_decode`, as `DecodeGraphs.run` gives them; parameters from `draw_parameters`, in host
        memory. None where it has to be run launch by launch."""
        assert self.graphs is not None
        if parameters["banned"] is not None:
            return None
        packed, rows = _pack(step, samples, self.pages.page_tokens), step.decoding
        return self.graphs.run(
            DecodeStep(
                token_ids=packed.token_ids,
                positions=packed.positions,
                slots=packed.slots,
                page_table=packed.page_table,
                context_lens=packed.context_lens,
                keys=samples.key[rows],
                counts=samples.count[rows],
                parameters=parameters,
            )
        )

    @torch.no_grad()
    def run(self, step: Step, samples: Samples) -> torch.Tensor:
        """Logits (L, V) of the decoding samples' tokens, guesses among them, of the last token of each completed prefill, and
        of the tokens of scored prompts."""
        packed = _pack(step, samples, self.pages.page_tokens)
        if self._parallel is not None:
            given = (packed.token_ids, packed.slots, packed.query_starts, packed.keep)
            self._parallel.same("step", *(x.tobytes() for x in given))
        device, num_tokens = self.model.device, len(packed.token_ids)
        repeats = row_bucket(num_tokens) - num_tokens if device.type == "cpu" else 0
        token_ids, positions, slots = (
            torch.from_numpy(np.concatenate([x, np.repeat(x[-1:], repeats)])).to(device)
            for x in (packed.token_ids, packed.positions, packed.slots)
        )
        adapters = self._adapters(step, samples, packed, repeats) if self.adapters else ()
        context = PagedContext(
            k_pages=self.pages.k,
            v_pages=self.pages.v,
            slots=slots,
            page_table=packed.page_table,
            context_lens=packed.context_lens,
            query_starts=packed.query_starts,
            kv_scales=self.pages.scales,
        )
        keep = torch.from_numpy(packed.keep).to(device) if step.chunks else None
        logits = self.forward(token_ids, positions, context, keep, adapters)
        return logits if step.chunks else logits[:num_tokens]

    def _adapters(self, step: Step, samples: Samples, packed: PackedStep, repeats: int) -> AdapterRows:
        """Which tokens are whose; those that fill a bucket write the last one's keys again, and so are that one's."""
        jobs = [*(samples.job[row] for row in step.decoding.tolist()), *(c.prefill.job for c in step.chunks)]
        of_sequence = np.asarray([0 if job is None else job.adapter for job in jobs], np.int64)
        of_token = np.repeat(of_sequence, np.diff(packed.query_starts))
        of_token = np.concatenate([of_token, np.repeat(of_token[-1:], repeats)])
        found = np.unique(of_token)
        if len(found) == 1:
            return [(self.adapters[n], None) for n in found.tolist() if n]
        rows = {n: torch.from_numpy(np.flatnonzero(of_token == n)) for n in found.tolist() if n}
        return [(self.adapters[n], own.to(self.model.device)) for n, own in rows.items()]


@dataclass(frozen=True)
class PackedStep:
    """A step's N tokens of S sequences, decoding samples first; int64 throughout."""

    token_ids: np.ndarray  # (N,)
    positions: np.ndarray  # (N,) in their sequences
    slots: np.ndarray  # (N,) page * page_tokens + place in it
    page_table: np.ndarray  # (S, W)
    context_lens: np.ndarray  # (S,) the new tokens included
    query_starts: np.ndarray  # (S + 1,)
    keep: np.ndarray  # (L,) tokens whose logits are wanted


def _pack(step: Step, samples: Samples, page_tokens: int) -> PackedStep:
    chunks = step.chunks
    most = samples.position(step.decoding) + step.guesses.counts
    width = -(-max([most.max(initial=-1) + 1, *(c.end for c in chunks)]) // page_tokens)
    decoding = _pack_decoding(step, samples, width, page_tokens)
    if not chunks:
        return decoding
    parts = [decoding, *(_pack_chunk(c, width, page_tokens) for c in chunks)]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(p, name) for p in parts])

    lengths = [c.end - c.start for c in chunks]
    starts = np.concatenate([decoding.query_starts, len(decoding.keep) + np.cumsum(lengths)])
    of_chunks = starts[len(step.decoding) :]
    last = of_chunks[1:][[c.is_last for c in chunks]] - 1
    scored = [start + np.arange(c.num_scored) for start, c in zip(of_chunks, chunks) if c.num_scored]
    return PackedStep(
        token_ids=joined("token_ids"),
        positions=joined("positions"),
        slots=joined("slots"),
        page_table=joined("page_table"),
        context_lens=joined("context_lens"),
        query_starts=starts,
        keep=np.concatenate([decoding.keep, last, *scored]),
    )


def _pack_decoding(step: Step, samples: Samples, width: int, page_tokens: int) -> PackedStep:
    """The decoding samples, each with its newest token and the guesses that follow it."""
    rows, guesses = step.decoding, step.guesses
    lengths = guesses.counts + 1
    starts = np.concatenate([[0], np.cumsum(lengths)])
    row = np.repeat(rows, lengths)
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    token_ids = samples.next_token[row]
    if starts[-1] > len(rows):
        guessed = np.arange(guesses.tokens.shape[1]) < guesses.counts[:, None]
        token_ids[place > 0] = guesses.tokens[guessed]
    positions = samples.position(row) + place
    return PackedStep(
        token_ids=token_ids,
        positions=positions,
        slots=samples.table[row, positions // page_tokens] * page_tokens + positions % page_tokens,
        page_table=samples.table[rows, :width],
        context_lens=positions[starts[1:] - 1] + 1,
        query_starts=starts,
        keep=np.arange(starts[-1]),
    )


def _pack_chunk(chunk: Chunk, width: int, page_tokens: int) -> PackedStep:
    """One chunk by itself; `_pack` counts its query_starts and keep anew."""
    pages = np.zeros(width, np.int64)
    own = chunk.prefill.pages[:width]
    pages[: len(own)] = own
    positions = np.arange(chunk.start, chunk.end)
    return PackedStep(
        token_ids=chunk.prefill.token_ids[chunk.start : chunk.end],
        positions=positions,
        slots=pages[positions // page_tokens] * page_tokens + positions % page_tokens,
        page_table=pages[None],
        context_lens=np.asarray([chunk.end]),
        query_starts=np.asarray([0, len(positions)]),
        keep=np.zeros(0, np.int64),
    )
