"""Log-probs of a prompt's own tokens, taken as its chunks go through the model.

Here: one request's. Not here: which rows of a pass they come from (`rlhf.rollout.runner`).
"""

from __future__ import annotations

import numpy as np
import torch

from rlhf.kernels.logprob import log_softmax, token_logprobs
from rlhf.rollout.request import PromptLogprobs, TopLogprobs

_MOST_LOGITS = 1 << 25  # of one chunk, numbers
_LEAST_ROWS = 16


class PromptScores:
    """Of a prompt (n,) at temperature `temperature` > 0, with the `num_top` likeliest tokens at each place."""

    def __init__(self, prompt: np.ndarray, *, num_top: int, temperature: float, vocab: int) -> None:
        self.most_rows = max(_MOST_LOGITS // vocab, _LEAST_ROWS)  # tokens of one chunk
        self._targets = torch.from_numpy(prompt[1:])
        self._temperature, self._num_top = temperature, num_top
        self._logprobs = np.full(len(prompt) - 1, np.nan, np.float32)
        self._top: list[TopLogprobs | None] = [None] * (len(prompt) - 1)
        self._is_known = np.zeros(len(prompt) - 1, bool)

    @property
    def is_complete(self) -> bool:
        return bool(self._is_known.all())

    def num_rows(self, start: int, end: int) -> int:
        """How many of the tokens start..end, from the first, have a next one in the prompt."""
        return max(min(end, len(self._targets)) - start, 0)

    def note(self, start: int, logits: torch.Tensor) -> None:
        """logits (k, V) at the prompt's tokens start, start + 1, ..., start + k - 1."""
        span = slice(start, start + len(logits))
        targets = self._targets[span].to(logits.device)
        self._logprobs[span] = token_logprobs(logits, targets, self._temperature)[0].cpu().numpy()
        if self._num_top:
            at = logits.new_full((len(logits),), self._temperature, dtype=torch.float32)
            likeliest = log_softmax(logits, at).topk(min(self._num_top, logits.shape[1]), -1)
            for i, (values, ids) in enumerate(
                zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
            ):
                self._top[start + i] = TopLogprobs(tuple(ids), tuple(values), (), ())
        self._is_known[span] = True

    def take(self, known: PromptLogprobs) -> None:
        """What another engine found."""
        self._logprobs[:] = known.logprobs
        self._top[: len(known.top_logprobs)] = known.top_logprobs
        self._is_known[:] = True

    def forget(self) -> None:
        self._is_known[:] = False

    def result(self) -> PromptLogprobs:
        top = tuple(entry for entry in self._top if entry is not None)
        return PromptLogprobs(tuple(self._logprobs.tolist()), top)
