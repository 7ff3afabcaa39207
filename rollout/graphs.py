"""CUDA graphs of the engine's decoding steps: all launches of a step, the draw among them, recorded once and run as one.

From Python a layer's launches take longer than a GPU does for few tokens. A step in which every sample goes on by one token has
the same launches as another one of as many rows; what differs lies in tensors that stay where they are. Rows are filled up to
a few numbers of them with copies of the last one, which change nobody's bits. Here: `DecodeGraphs`. Not here: steps with
chunks of prompts, guesses, adapters or special wishes, which run launch by launch; what a step computes
(`rlhf.models.fused`, `rlhf.kernels.sampling`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from rlhf.kernels import gpu
from rlhf.kernels.layout import Noted
from rlhf.kernels.sampling import sample
from rlhf.models.attention import PagedContext
from rlhf.models.fused import StepForward
from rlhf.rollout.cache import KVPages

Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]

CUTS = ("top_k", "top_p", "min_p")
_AFTER = 4  # steps of a shape before it is recorded: tails go through many shapes once
_MOST_ROWS, _MOST_GRAPHS = 512, 64
_STEPS = (
    (8, 1),
    (64, 8),
    (256, 32),
    (_MOST_ROWS, 64),
)  # rows up to the first are filled up to multiples of the second


@dataclass(frozen=True)
class DecodeStep:
    """A step in which each of R samples goes on by one token, in host memory."""

    token_ids: np.ndarray  # (R,) int64
    positions: np.ndarray  # (R,) int64
    slots: np.ndarray  # (R,) int64, page * page_tokens + place in it
    page_table: np.ndarray  # (R, W)
    context_lens: np.ndarray  # (R,) the new tokens included
    keys: np.ndarray  # (R,) int64, of the samples' noise
    counts: np.ndarray  # (R,) int64, which token of the response is drawn
    parameters: Mapping[str, torch.Tensor | None]  # temperature, and of CUTS what some row uses, (R,)


class DecodeGraphs:
    """The graphs of one engine."""

    def __init__(self, forward: StepForward, pages: KVPages, record: Record) -> None:
        self._forward, self._pages, self._record = forward, pages, record
        self._seen: Counter[_Shape] = Counter()
        self._graphs: dict[_Shape, _Graph] = {}
        self._noted: Noted | None = None  # of pages that the graphs read
        self._addresses: tuple[int, ...] = ()  # of weights that they read
        self._works = True

    def refresh(self) -> None:
        """Take note of weights that were moved or joined anew: call it where `StepForward.refresh` is called."""
        addresses = self._forward.addresses
        if addresses != self._addresses:
            self.forget()
            self._addresses = addresses

    def forget(self) -> None:
        """Drop the graphs and their memory."""
        self._graphs.clear()
        self._seen.clear()
        self._noted = None

    def run(self, step: DecodeStep) -> np.ndarray | None:
        """(3, R) float64: tokens, log-probs and processed log-probs of the draws, as `sample` has them; None where the step is
        to be run launch by launch."""
        if not self._works or not self._forward.is_fused or not 0 < len(step.token_ids) <= _MOST_ROWS:
            return None
        self._note_pages()
        shape = _shape(step, self._pages.page_tokens)
        graph = self._graphs.get(shape)
        if graph is None:
            self._seen[shape] += 1
            if self._seen[shape] <= _AFTER or len(self._graphs) >= _MOST_GRAPHS:
                return None
            graph = self._recorded(shape, step)
            if graph is None:
                return None
        return graph.run(step)

    def _recorded(self, shape: _Shape, step: DecodeStep) -> _Graph | None:
        try:
            graph = self._graphs[shape] = _Graph(shape, self._forward, self._pages, self._record, step)
        except RuntimeError as error:
            self._works = False
            self.forget()
            warnings.warn(
                f"a decoding step of {shape.rows} rows could not be recorded as a CUDA graph, steps run launch by launch: {error}",
                stacklevel=2,
            )
            return None
        return graph

    def _note_pages(self) -> None:
        pages = self._pages
        now = [*pages.k, *pages.v, *(s for pair in pages.scales or () for s in pair)]
        if self._noted is None or not self._noted.hold(now):
            self.forget()
            self._noted = Noted(now, written=False)


@dataclass(frozen=True)
class _Shape:
    """What a graph is recorded for."""

    rows: int
    pages: int  # of a context, at most
    cuts: tuple[str, ...]


def _shape(step: DecodeStep, page_tokens: int) -> _Shape:
    rows = len(step.token_ids)
    unit = next(unit for most, unit in _STEPS if rows <= most)
    longest = max(int(step.context_lens.max()), 512)
    pages = -(-(1 << (longest - 1).bit_length()) // page_tokens)
    cuts = tuple(name for name in CUTS if step.parameters[name] is not None)
    return _Shape(-(-rows // unit) * unit, pages, cuts)


class _Graph:
    """A shape's launches, and the tensors that they read."""

    def __init__(
        self, shape: _Shape, forward: StepForward, pages: KVPages, record: Record, step: DecodeStep
    ) -> None:
        from rlhf.kernels.attention_triton import DecodePlan

        device, rows = pages.device, shape.rows
        self._shape, self._forward, self._device = shape, forward, device
        self._whole = torch.zeros(6, rows, dtype=torch.int64, device=device)
        self._real = torch.zeros(3, rows, dtype=torch.float64, device=device)
        self._plan = DecodePlan(rows, shape.pages, pages.page_tokens, device)
        self._context = PagedContext(
            k_pages=pages.k,
            v_pages=pages.v,
            slots=self._whole[2],
            page_table=self._plan.page_table,
            context_lens=self._plan.context_lens,
            query_starts=np.arange(rows + 1),
            kv_scales=pages.scales,
            made_plan=self._plan,
        )
        self._write(step)
        self._compute()  # which says what work there is to be written down
        self._write(step)
        self._replay = record(self._compute)

    def run(self, step: DecodeStep) -> np.ndarray:
        self._write(step)
        return self._replay().cpu().numpy()[:, : len(step.token_ids)]

    def _compute(self) -> torch.Tensor:
        token_ids, positions, _, keys, counts, top_k = self._whole
        temperature, top_p, min_p = self._real
        self._context.forget_rows()
        logits = self._forward(token_ids, positions, self._context)
        given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        cuts = {name: given[name] for name in self._shape.cuts}
        drawn = sample(logits, keys, counts, temperature.float(), **cuts)
        return torch.stack([x.double() for x in (drawn.tokens, drawn.logprobs, drawn.processed_logprobs)])

    def _write(self, step: DecodeStep) -> None:
        rows = np.minimum(
            np.arange(self._shape.rows), len(step.token_ids) - 1
        )  # the last one again and again
        given = {name: x.numpy() for name, x in step.parameters.items() if x is not None}
        none = np.zeros(len(step.token_ids), np.int64)
        whole = (step.token_ids, step.positions, step.slots, step.keys, step.counts, given.get("top_k", none))
        real = [given.get(name, none).astype(np.float64) for name in ("temperature", "top_p", "min_p")]
        for to, numbers in ((self._whole, np.stack(whole)), (self._real, np.stack(real))):
            to.copy_(_pinned(torch.from_numpy(numbers[:, rows]), self._device), non_blocking=True)
        self._plan.fill(step.context_lens[rows], step.page_table[rows, : self._shape.pages])


def _pinned(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return x.pin_memory() if device.type == "cuda" else x


def serves(model: torch.nn.Module) -> bool:
    """Whether a model's steps can be recorded: on a GPU that all Triton kernels take."""
    weight = next(model.parameters())
    return gpu.serves(weight) and gpu.holds_tiles(weight, gpu.LARGEST_HEAD)


class Recorder:
    """Records on a stream of its own; the graphs of one recorder share their memory, so one runs at a time and its result is
    read before the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        with torch.cuda.device(self._device), torch.no_grad():
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # what is compiled, looked up or allotted once
                compute()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                out = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay
