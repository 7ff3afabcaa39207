"""Samples with wishes that arrays do not hold: changed logits, texts and grammars that end them, log-probs of more tokens.

Here: one object per such sample, worked on one by one; all other samples never come here. Not here: what a wish means
(`rlhf.rollout.processors`, `rlhf.rollout.grammar`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlhf.kernels.logprob import log_softmax, token_logprobs
from rlhf.kernels.sampling import Sampled, keep_top_k, keep_top_p
from rlhf.rollout.grammar import GrammarError, Grammars, GrammarState
from rlhf.rollout.processors import changes_logits, processed
from rlhf.rollout.request import Request, SamplingParams, TopLogprobs
from rlhf.rollout.samples import STOP, Job, Samples

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_TAIL_TOKENS = 16  # decoded beside as many as a stop text has characters: tokens that are no whole character


@dataclass
class Special:
    """One sample's own state."""

    params: SamplingParams
    prompt: np.ndarray
    grammar: GrammarState | None
    top: list[TopLogprobs] = field(default_factory=list)


def is_special(params: SamplingParams) -> bool:
    return bool(changes_logits(params) or params.stop or params.top_logprobs)


class SpecialRows:
    """Rows of `samples` that have wishes."""

    def __init__(self, samples: Samples, tokenizer: Any, grammars: Grammars) -> None:
        self._samples, self._tokenizer, self._grammars = samples, tokenizer, grammars
        self._rows: dict[int, Special] = {}

    def check(self, request: Request, vocab: int) -> None:
        """Raises ValueError for wishes that cannot be met."""
        params, name = request.params, request.id
        ids = [*(params.allowed_ids or ()), *params.banned_ids, *(token for token, _ in params.logit_bias)]
        bad = [token for token in ids if not 0 <= token < vocab]
        if bad:
            raise ValueError(
                f"request {name!r}: token id {bad[0]} in allowed_ids, banned_ids or logit_bias is outside the model's "
                f"vocabulary of {vocab}"
            )
        if params.stop and self._tokenizer is None:
            raise ValueError(
                f"request {name!r} has stop texts, which need a tokenizer; give the engine one: Engine(..., tokenizer=)"
            )
        if params.grammar is not None:
            try:
                self._grammars.check(params.grammar)
            except GrammarError as error:
                raise GrammarError(f"request {name!r}: {error}") from error

    def add(self, job: Job) -> None:
        params = job.request.params
        if not is_special(params):
            return
        for index, row in enumerate(job.rows.tolist()):
            state = self._grammars.begin(params.grammar) if params.grammar is not None else None
            special = Special(params, job.prompt, state)
            if job.request.begun:
                special.top += job.request.begun[index].top_logprobs
                for token in job.request.begun[index].token_ids if state is not None else ():
                    state.advance(token)
            self._rows[row] = special

    def remove(self, job: Job) -> None:
        for row in job.rows.tolist():
            self._rows.pop(row, None)

    def among(self, rows: np.ndarray) -> np.ndarray:
        """(k,) where in `rows` special ones are."""
        if not self._rows:
            return np.zeros(0, np.int64)
        return np.flatnonzero([row in self._rows for row in rows.tolist()])

    def top(self, row: int) -> tuple[TopLogprobs, ...]:
        return tuple(self._rows[row].top) if row in self._rows else ()

    def newest(self, row: int) -> tuple[TopLogprobs, ...]:
        """Of the last token."""
        return tuple(self._rows[row].top[-1:]) if row in self._rows else ()

    def logits(self, rows: np.ndarray, logits: torch.Tensor) -> torch.Tensor:
        """(k, V) raw logits -> (k, V) fp32 that the rows are drawn from."""
        return torch.stack([self._changed(row, logits[i]) for i, row in enumerate(rows.tolist())])

    def _changed(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        special = self._rows[row]
        if not changes_logits(special.params):
            return logits.float()
        response = self._samples.tokens[row, : self._samples.count[row]]
        changed = processed(logits, special.params, special.prompt, response)
        if special.grammar is not None:
            changed.masked_fill_(~special.grammar.mask().to(changed.device), -torch.inf)
        return changed

    def raw_logprobs(self, logits: torch.Tensor, drawn: Sampled, temperature: torch.Tensor) -> Sampled:
        """What was drawn from changed logits, with the log-probs that the raw ones (k, V) give."""
        at = torch.where(temperature == 0, 1.0, temperature)
        raw, _ = token_logprobs(logits, drawn.tokens, at)
        return Sampled(drawn.tokens, raw, drawn.processed_logprobs)

    def note(
        self, rows: np.ndarray, raw: torch.Tensor, changed: torch.Tensor, parameters: dict[str, Any]
    ) -> None:
        """After the rows' tokens were recorded: keep the likeliest tokens, and end what a text or a grammar ends."""
        tops = [self._rows[row].params.top_logprobs for row in rows.tolist()]
        if any(tops):
            self._keep_top(rows, tops, raw, changed, parameters)
        samples = self._samples
        for row in rows.tolist():
            special = self._rows[row]
            is_over = special.grammar is not None and special.grammar.advance(int(samples.next_token[row]))
            if is_over or self._has_stop(row, special.params):
                samples.finished[row] = STOP

    def _has_stop(self, row: int, params: SamplingParams) -> bool:
        count = int(self._samples.count[row])
        if not params.stop or count < params.min_tokens:
            return False
        tail = max(map(len, params.stop)) + _TAIL_TOKENS
        ids = self._samples.tokens[row, max(count - tail, 0) : count].tolist()
        text = self._tokenizer.decode(ids)
        before = self._tokenizer.decode(ids[:-1]).rstrip(_UNKNOWN) if params.min_tokens and ids[1:] else ""
        return any(stop in text[max(len(before) - len(stop) + 1, 0) :] for stop in params.stop)

    def _keep_top(
        self,
        rows: np.ndarray,
        tops: list[int],
        raw: torch.Tensor,
        changed: torch.Tensor,
        parameters: dict[str, Any],
    ) -> None:
        temperature = parameters["temperature"]
        at = torch.where(temperature == 0, 1.0, temperature)
        kept = changed / at[:, None]
        if parameters["banned"] is not None:
            kept = kept.index_put(parameters["banned"], kept.new_tensor(-torch.inf))
        if parameters["top_k"] is not None:
            kept = keep_top_k(kept, parameters["top_k"])
        if parameters["top_p"] is not None:
            kept = keep_top_p(kept, parameters["top_p"])
        if parameters["min_p"] is not None:
            floor = kept.amax(-1, True) + parameters["min_p"].log()[:, None].float()
            kept = kept.masked_fill(kept < floor, -torch.inf)
        most = max(tops)
        columns = [
            x.cpu().numpy()
            for scores in (log_softmax(raw, at), torch.log_softmax(kept, -1))
            for x in scores.topk(min(most, scores.shape[1]), -1)
        ]
        for i, (row, top) in enumerate(zip(rows.tolist(), tops, strict=True)):
            if not top:
                continue
            values, ids, kept_values, kept_ids = (column[i, :top] for column in columns)
            there = np.isfinite(kept_values)
            self._rows[row].top.append(
                TopLogprobs(
                    tuple(ids.tolist()), tuple(values.tolist()),
                    tuple(kept_ids[there].tolist()), tuple(kept_values[there].tolist()),
                )
            )  # fmt: skip
