"""Structured output: which tokens may come next under a JSON schema, a regular expression or a grammar.

Here: a request's constraint and the state of each of its samples, over llguidance (an optional package). Not here: what a
constraint may say (llguidance's own documentation).
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import torch

from rlhf.rollout.request import Grammar

_MOST_KEPT = 256  # constraints, as read


class GrammarError(ValueError):
    """A constraint that cannot be read, or that no text can satisfy."""


class Grammars:
    """Makes constraints for one tokenizer; `tokenizer` is a fast Hugging Face one, `vocab` the model's tokens."""

    def __init__(self, tokenizer: Any, vocab: int) -> None:
        self._tokenizer, self._vocab = tokenizer, vocab
        self._matcher = functools.lru_cache(maxsize=_MOST_KEPT)(self._make)

    @functools.cached_property
    def _of_library(self) -> Any:
        try:
            import llguidance.hf
        except ImportError as error:
            raise GrammarError(
                "structured output needs the package llguidance; install it with pip install 'rlhf[serve]'"
            ) from error
        if self._tokenizer is None:
            raise GrammarError(
                "structured output needs a tokenizer; give the engine one: Engine(..., tokenizer=)"
            )
        return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocab)

    def check(self, grammar: Grammar) -> None:
        """Raises GrammarError for a constraint that cannot be read or satisfied."""
        self.begin(grammar)

    def begin(self, grammar: Grammar) -> GrammarState:
        """The state before the first token."""
        return GrammarState(self._matcher(grammar).deep_copy(), self._vocab)

    def _make(self, grammar: Grammar) -> Any:
        tokenizer = self._of_library
        import llguidance

        try:
            if grammar.kind == "json_schema":
                json.loads(grammar.text)
            make = getattr(llguidance.LLMatcher, f"grammar_from_{grammar.kind}")
            matcher = llguidance.LLMatcher(tokenizer, make(grammar.text))
        except ValueError as error:
            raise GrammarError(f"the {grammar.kind} cannot be read: {error}") from error
        if matcher.is_error():
            raise GrammarError(f"the {grammar.kind} cannot be read: {matcher.get_error()}")
        if not matcher.compute_bitmask().strip(b"\0"):
            raise GrammarError(f"no text satisfies the {grammar.kind}")
        return matcher


class GrammarState:
    """Where one sample is in its constraint."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def mask(self) -> torch.Tensor:
        """(V,) bool: the tokens that may come next."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(words, bitorder="little")[: self._vocab].astype(bool)
        return torch.from_numpy(np.pad(bits, (0, self._vocab - len(bits))))

    def advance(self, token: int) -> bool:
        """Take note of a token; whether the text is complete with it. Raises GrammarError for one that was not allowed."""
        if not self._matcher.consume_token(token):
            raise GrammarError(f"token {token} does not fit: {self._matcher.get_error()}")
        return self._matcher.is_stopped()
