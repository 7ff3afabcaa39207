"""The state of every sample of one call, as arrays: row s is sample s, requests in order, their samples in
order.

Here: what each sample is at and what it has written. The hot loop touches these with a handful of array
operations per step, never one Python object per sequence. Not here: who runs when (`rlhf.rollout.scheduler`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlhf.rollout.request import Completion, Request

RUNNING, STOP, LENGTH = 0, 1, 2
_REASONS = ("aborted", "stop", "length")


class Samples:
    """N samples of R requests; all arrays have N rows."""

    def __init__(self, requests: Sequence[Request], *, page_tokens: int, context: int):
        self.requests = requests
        self.prompts = [np.asarray(r.prompt_ids, dtype=np.int64) for r in requests]
        counts = [len(r.seeds) for r in requests]
        params = [r.params for r in requests]
        limits = [min(p.max_tokens, context - len(t)) for p, t in zip(params, self.prompts, strict=True)]

        def per_sample(values: Sequence, dtype: type) -> np.ndarray:
            return np.repeat(np.asarray(values, dtype=dtype), counts, axis=0)

        # what was asked for
        self.request = per_sample(range(len(requests)), np.int64)
        self.index = np.concatenate([np.arange(n) for n in counts]) if counts else np.zeros(0, np.int64)
        self.key = np.asarray([s for r in requests for s in r.seeds], dtype=np.int64)
        self.temperature = per_sample([p.temperature for p in params], np.float32)
        self.top_k = per_sample([p.top_k for p in params], np.int64)
        self.top_p = per_sample([p.top_p for p in params], np.float64)
        self.min_tokens = per_sample([p.min_tokens for p in params], np.int64)
        self.limit = per_sample(limits, np.int64)  # most response tokens, within the context
        self.stops = per_sample(_padded([p.stop_ids for p in params]), np.int64)  # (N, K), -1 = no more
        # where it is; the first three are written by the engine, the last two by the scheduler
        self.count = np.zeros(len(self), np.int64)  # response tokens written
        self.next_token = np.zeros(len(self), np.int64)  # the newest token, not yet in the cache
        self.finished = np.zeros(len(self), np.int8)
        longest = max((len(self.prompts[r]) + n for r, n in enumerate(limits)), default=0)
        width = -(-longest // page_tokens)
        self.table = np.zeros((len(self), width), np.int64)  # pages, in order of position
        self.num_pages = np.zeros(len(self), np.int64)
        self.prompt_tokens = np.asarray([len(t) for t in self.prompts], np.int64)[self.request]
        self.num_nan = 0  # tokens drawn from non-finite logits
        self._log: list[tuple[np.ndarray, ...]] = []

    def __len__(self) -> int:
        return len(self.request)

    def position(self, samples: np.ndarray) -> np.ndarray:
        """Where each sample's `next_token` stands in its sequence."""
        return self.prompt_tokens[samples] + self.count[samples] - 1

    def record(
        self, samples: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, processed: np.ndarray
    ) -> None:
        """Append one token to each of the given samples, and mark those that end with it."""
        self._log.append((samples, tokens, logprobs, processed))
        self.num_nan += int(np.isnan(logprobs).sum())
        self.next_token[samples] = tokens
        self.count[samples] += 1
        stop = (tokens[:, None] == self.stops[samples]).any(-1)
        length = self.count[samples] >= self.limit[samples]
        self.finished[samples] = np.where(stop, STOP, np.where(length, LENGTH, RUNNING))

    def token_ids(self, sample: int) -> np.ndarray:
        """The prompt and everything the sample has written."""
        rows, tokens, _, _ = self._merged()
        return np.concatenate([self.prompts[self.request[sample]], tokens[rows == sample]])

    def completions(self, version: int) -> list[list[Completion]]:
        """All samples, [request][sample]; one that was not finished is 'aborted'."""
        rows, *columns = self._merged()
        order = np.argsort(rows, kind="stable")  # the log is in order of position
        tokens, logprobs, processed = (c[order].tolist() for c in columns)
        ends = np.cumsum(self.count).tolist()
        out: list[list[Completion]] = [[] for _ in self.requests]
        for s, (r, end, n) in enumerate(zip(self.request.tolist(), ends, self.count.tolist(), strict=True)):
            span = slice(end - n, end)
            out[r].append(
                Completion(
                    request_id=self.requests[r].id,
                    index=len(out[r]),
                    token_ids=tuple(tokens[span]),
                    logprobs=tuple(logprobs[span]),
                    processed_logprobs=tuple(processed[span]),
                    policy_versions=(version,) * n,
                    finish_reason=_REASONS[self.finished[s]],
                )
            )
        return out

    def _merged(self) -> tuple[np.ndarray, ...]:
        if len(self._log) != 1:
            empty = tuple(np.zeros(0, t) for t in (np.int64, np.int64, np.float32, np.float32))
            self._log = [tuple(np.concatenate(c) for c in zip(empty, *self._log, strict=True))]
        return self._log[0]


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Ragged rows as one (R, K) array, -1 where a row has ended."""
    out = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int64)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def draw_parameters(
    samples: Samples, rows: np.ndarray, device: torch.device
) -> dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None]:
    """What `rlhf.kernels.sampling.sample` needs for the next token of the given samples; None = no row uses
    it.
    """

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    top_k, top_p, stops = samples.top_k[rows], samples.top_p[rows], samples.stops[rows]
    early = (samples.count[rows] < samples.min_tokens[rows])[:, None] & (stops >= 0)
    row, column = np.nonzero(early)
    return {
        "temperature": tensor(samples.temperature[rows]),
        "top_k": tensor(top_k) if (top_k > 0).any() else None,
        "top_p": tensor(top_p) if (top_p < 1).any() else None,
        "banned": (tensor(row), tensor(stops[row, column])) if len(row) else None,
    }
