"""The state of every sample that the engine knows, as arrays: row s is sample s, rows of finished requests are used again.

Here: what each sample is at and what it has written. The hot loop touches these with a handful of array
operations per step, never one Python object per sequence. Not here: who runs when (`rlhf.rollout.scheduler`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf.rollout.prompt_scores import PromptScores
from rlhf.rollout.request import Completion, Delta, FinishReason, Request

RUNNING, STOP, LENGTH, ABORTED = 0, 1, 2, 3
_REASONS: dict[int, FinishReason] = {RUNNING: "aborted", STOP: "stop", LENGTH: "length", ABORTED: "aborted"}
_PER_SAMPLE = {  # what a row holds of one number each, and its type
    # what was asked for
    "key": np.int64,
    "temperature": np.float32,
    "top_k": np.int64,
    "top_p": np.float64,
    "min_p": np.float64,
    "min_tokens": np.int64,
    "streams": np.bool_,  # every token is told
    "limit": np.int64,  # most response tokens, within the context
    "prompt_tokens": np.int64,
    # where it is; the last two are written by the scheduler, the others by the engine
    "count": np.int64,  # response tokens written
    "told": np.int64,  # of them, those that `newest` gave out
    "next_token": np.int64,  # the newest token, not yet in the cache
    "finished": np.int8,
    "num_pages": np.int64,  # from the first on
    "first_page": np.int64,  # of those that it still holds; entries of the table before it repeat that one
}
_PER_TOKEN = {  # of the response, with one entry per token
    "tokens": np.int64,
    "logprobs": np.float32,
    "processed": np.float32,
    "versions": np.int64,
}


@dataclass(eq=False)
class Job:
    """A request in work."""

    request: Request
    number: int  # of its arrival
    prompt: np.ndarray  # (n,) int64
    rows: np.ndarray  # (k,) of its samples, in order
    scores: PromptScores | None = None  # of its prompt, where asked for
    adapter: int = 0  # number of its adapter in the engine, 0 = none
    cached_tokens: int | None = None  # of its prompt, found in the cache when it first ran


class Samples:
    """Rows of samples; every array has as many rows as there is room for."""

    key: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    min_tokens: np.ndarray
    streams: np.ndarray
    limit: np.ndarray
    prompt_tokens: np.ndarray
    count: np.ndarray
    told: np.ndarray
    next_token: np.ndarray
    finished: np.ndarray
    num_pages: np.ndarray
    first_page: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    processed: np.ndarray
    versions: np.ndarray

    def __init__(self, *, page_tokens: int, context: int):
        self.page_tokens, self.context = page_tokens, context
        for name, dtype in _PER_SAMPLE.items():
            setattr(self, name, np.zeros(0, dtype))
        for name, dtype in _PER_TOKEN.items():
            setattr(self, name, np.zeros((0, 0), dtype))
        self.table = np.zeros((0, 0), np.int64)  # pages, in order of position
        self.stops = np.full((0, 0), -1, np.int64)  # -1 = no more
        self.job: list[Job | None] = []  # of each row
        self.num_nan = 0  # tokens drawn from non-finite logits
        self._free: list[int] = []
        self._arrived = 0

    def __len__(self) -> int:
        """Samples in work."""
        return len(self.job) - len(self._free)

    def add(self, requests: Sequence[Request]) -> list[Job]:
        """Rows for the samples of new requests."""
        if not requests:
            return []
        counts = [len(r.seeds) for r in requests]
        params = [r.params for r in requests]
        prompts = [np.asarray(r.prompt_ids, dtype=np.int64) for r in requests]
        limits = [min(p.max_tokens, self.context - len(t)) for p, t in zip(params, prompts, strict=True)]
        self._make_room(
            sum(counts),
            response=max(limits, default=0),
            text=max((len(t) + n for t, n in zip(prompts, limits, strict=True)), default=0),
            stops=max((len(p.stop_ids) for p in params), default=0),
        )
        rows = np.asarray([self._free.pop() for _ in range(sum(counts))], np.int64)

        def put(name: str, values: Sequence) -> None:
            array = getattr(self, name)
            array[rows] = np.repeat(np.asarray(values, array.dtype), counts, axis=0)

        for name in ("temperature", "top_k", "top_p", "min_p", "min_tokens"):
            put(name, [getattr(p, name) for p in params])
        put("streams", [r.stream for r in requests])
        put("limit", limits)
        put("prompt_tokens", [len(t) for t in prompts])
        put("stops", _padded([p.stop_ids for p in params], self.stops.shape[1]))
        self.key[rows] = [s for r in requests for s in r.seeds]
        for name in ("count", "told", "next_token", "finished", "num_pages", "first_page"):
            getattr(self, name)[rows] = 0
        jobs = []
        for request, prompt, own in zip(
            requests, prompts, np.split(rows, np.cumsum(counts)[:-1]), strict=True
        ):
            jobs.append(Job(request, self._arrived, prompt, own))
            self._arrived += 1
            for row, begun in zip(own, request.begun):
                self._begin(row, begun)
            for row in own:
                self.job[row] = jobs[-1]
        return jobs

    def free(self, job: Job) -> None:
        """Give the rows of a request back."""
        for row in job.rows[::-1].tolist():
            self.job[row] = None
            self._free.append(row)

    def position(self, samples: np.ndarray) -> np.ndarray:
        """Where each sample's `next_token` stands in its sequence."""
        return self.prompt_tokens[samples] + self.count[samples] - 1

    def record(
        self,
        samples: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        processed: np.ndarray,
        version: int,
    ) -> None:
        """Append one token to each of the given samples, and mark those that end with it."""
        at = self.count[samples]
        self.tokens[samples, at], self.logprobs[samples, at] = tokens, logprobs
        self.processed[samples, at], self.versions[samples, at] = processed, version
        self.num_nan += int(np.isnan(logprobs).sum())
        self.next_token[samples] = tokens
        self.count[samples] = at + 1
        stop = (tokens[:, None] == self.stops[samples]).any(-1)
        length = at + 1 >= self.limit[samples]
        self.finished[samples] = np.where(stop, STOP, np.where(length, LENGTH, RUNNING))

    def token_ids(self, sample: int) -> np.ndarray:
        """The prompt and everything the sample has written."""
        job = self.job[sample]
        assert job is not None, f"row {sample} is free"
        return np.concatenate([job.prompt, self.tokens[sample, : self.count[sample]]])

    def is_done(self, job: Job) -> bool:
        return bool((self.finished[job.rows] != RUNNING).all())

    def completions(self, job: Job) -> list[Completion]:
        """A request's samples as they are; one that is not finished is 'aborted'."""
        return [
            Completion(
                job.request.id,
                index,
                *self._written(row, slice(0, int(self.count[row]))),
                _REASONS[int(self.finished[row])],
            )
            for index, row in enumerate(job.rows.tolist())
        ]

    def newest(self, job: Job, drawing: np.ndarray) -> Iterator[Delta]:
        """What each of a request's samples that are among the rows `drawing` has written since the last time."""
        drew = np.isin(job.rows, drawing)
        for index in np.flatnonzero(drew).tolist():
            row = int(job.rows[index])
            new = slice(int(self.told[row]), int(self.count[row]))
            self.told[row] = self.count[row]
            reason = _REASONS[int(self.finished[row])] if self.finished[row] != RUNNING else None
            yield Delta(index, *self._written(row, new), reason)

    def _written(self, row: int, span: slice) -> Iterator[tuple]:
        for array in (self.tokens, self.logprobs, self.processed, self.versions):
            yield tuple(array[row, span].tolist())

    def _begin(self, row: int, begun: Completion) -> None:
        """Go on from what was written before."""
        n = len(begun.token_ids)
        for name, values in (
            ("tokens", begun.token_ids),
            ("logprobs", begun.logprobs),
            ("processed", begun.processed_logprobs),
            ("versions", begun.policy_versions),
        ):
            getattr(self, name)[row, :n] = values
        self.count[row] = self.told[row] = n
        if n and begun.token_ids[-1] in self.stops[row]:
            self.finished[row] = STOP
        elif n >= self.limit[row]:
            self.finished[row] = LENGTH
        if n:
            self.next_token[row] = begun.token_ids[-1]

    def _make_room(self, rows: int, *, response: int, text: int, stops: int) -> None:
        """Let there be that many free rows, and columns for the longest of them."""
        missing = rows - len(self._free)
        height = len(self.job)
        if missing > 0:
            height = max(height + missing, height * 2)
        for name in _PER_SAMPLE:
            setattr(self, name, _grown(getattr(self, name), height))
        for name in _PER_TOKEN:
            setattr(self, name, _grown(getattr(self, name), height, response))
        self.table = _grown(self.table, height, -(-text // self.page_tokens))
        self.stops = _grown(self.stops, height, stops, fill=-1)
        self._free[:0] = range(height - 1, len(self.job) - 1, -1)
        self.job += [None] * (height - len(self.job))


def _grown(array: np.ndarray, rows: int, columns: int | None = None, fill: int = 0) -> np.ndarray:
    """The array, or a larger one that begins with it."""
    shape = (rows,) if columns is None else (rows, max(columns, array.shape[1]))
    if array.shape == shape:
        return array
    larger = np.zeros(shape, array.dtype) if fill == 0 else np.full(shape, fill, array.dtype)
    larger[tuple(slice(0, n) for n in array.shape)] = array
    return larger


def _padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Ragged rows as one (R, width) array, -1 where a row has ended."""
    out = np.full((len(rows), width), -1, np.int64)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def draw_parameters(
    samples: Samples, rows: np.ndarray, counts: np.ndarray, device: torch.device
) -> dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None]:
    """What `rlhf.kernels.sampling.sample` needs for the draw of the given samples after `counts` (R,) response tokens;
    None = no row uses it."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    top_k, top_p, min_p = samples.top_k[rows], samples.top_p[rows], samples.min_p[rows]
    stops = samples.stops[rows]
    early = (counts < samples.min_tokens[rows])[:, None] & (stops >= 0)
    row, column = np.nonzero(early)
    return {
        "temperature": tensor(samples.temperature[rows]),
        "top_k": tensor(top_k) if (top_k > 0).any() else None,
        "top_p": tensor(top_p) if (top_p < 1).any() else None,
        "min_p": tensor(min_p) if (min_p > 0).any() else None,
        "banned": (tensor(row), tensor(stops[row, column])) if len(row) else None,
    }
