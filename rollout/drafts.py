"""Guesses at the next tokens of samples: what followed the same words before, in the prompt, in the sample's own text, in
the others of its group, and in earlier epochs' responses to the prompt.

The engine runs a sample's guesses in the pass of its next token and draws at every one of them; a guess stands if it is
what is drawn, and the draw after the last one that stands is the sample's next token. A draw depends on the logits, the
sample's key and its place alone (`rlhf.kernels.sampling`), so that tokens are those of an engine that guesses nothing
(lossless speculation, Leviathan et al. 2022, arXiv 2211.17192, with the draw itself as the test), to the bit where
the logits of a row do not depend on the rows beside it. Guesses come from suffix matches (Saxena 2023, "prompt lookup
decoding"; SuffixDecoding, Oliaro et al. 2024, arXiv 2411.04975). How many are worth their rows is learnt from how often
they stood; nothing here reads a clock. Not here: the pass itself.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from rlhf.rollout.lengths import prompt_digest
from rlhf.rollout.samples import Job, Samples
from rlhf.rollout.special import is_special

_GRAMS = (8, 3)  # tokens by which places are looked up, the longer first
_LONGEST = 16  # tokens of a match beyond which it is no better
_PLACES = 8  # newest ones of a gram that are compared
_ROWS_OF_A_PASS = {"cpu": 16.0, "cuda": 256.0}  # rows that take as long again as a pass over one takes
_HALF_LIFE = 512  # guesses at a length of match until what was learnt before them weighs half
_HOPE = 2.0  # guesses that all stood, where nothing is known
_FORGET = 1 / 64  # of what was learnt, with each finished request
_MOST_TOKENS = 1 << 24  # of earlier responses that are kept


@dataclass(frozen=True)
class Guesses:
    """For R samples."""

    tokens: np.ndarray  # (R, D) int64; what lies beyond a row's count has no meaning
    counts: np.ndarray  # (R,) int64
    matches: np.ndarray  # (R,) int64 how many tokens before them were alike, _LONGEST at most

    @classmethod
    def none(cls, rows: int, width: int = 0) -> Guesses:
        nothing = np.zeros(rows, np.int64)
        return cls(np.zeros((rows, width), np.int64), nothing, nothing)

    def __getitem__(self, rows: np.ndarray) -> Guesses:
        """Of some rows."""
        return Guesses(self.tokens[rows], self.counts[rows], self.matches[rows])

    def with_none(self, rows: int) -> Guesses:
        """And for as many rows more, none."""
        if not rows:
            return self
        more = Guesses.none(rows, self.tokens.shape[1])
        pairs = ((self.tokens, more.tokens), (self.counts, more.counts), (self.matches, more.matches))
        return Guesses(*(np.concatenate(pair) for pair in pairs))

    def stood(self, drawn: np.ndarray) -> np.ndarray:
        """(R,) how many of each row's guesses, from the first, are what was drawn; drawn (N,) holds a row's draws one after
        another, one more than its guesses."""
        width = np.arange(self.tokens.shape[1])
        first = np.cumsum(self.counts + 1) - self.counts - 1
        at = np.minimum(first[:, None] + width, len(drawn) - 1)
        same = (drawn[at] == self.tokens) & (width < self.counts[:, None])
        return same.cumprod(-1).sum(-1)


class Drafts:
    """Guesses of at most `most` tokens for a sample, 0: none. What was learnt outlives what is in work."""

    def __init__(self, most: int, device: str) -> None:
        self.most = most
        self.num_drafted = self.num_accepted = 0
        self._rows_of_a_pass = _ROWS_OF_A_PASS.get(device, 1.0)
        self._texts: dict[
            int, _Texts | None
        ] = {}  # by the number of a job in work; None: its draws are not plain
        self._earlier = _Earlier()
        # by the length of a match, guesses and those that stood; nothing is known at first and all is hoped
        self._tried, self._stood = np.full(_LONGEST + 1, _HOPE), np.full(_LONGEST + 1, _HOPE)

    def begin_anew(self, samples: Samples) -> None:
        """Nothing is in work yet: what will be are rows of `samples`."""
        self._samples, self._texts = samples, {}
        self.num_drafted = self.num_accepted = 0

    def guess(self, rows: np.ndarray, others: int, room: np.ndarray, budget: int) -> Guesses:
        """For samples `rows` (R,) that decode in a pass with `others` more tokens: at most `room` (R,) for each and `budget`
        in all, those that are likeliest to stand first, as far as one more row costs less than it is worth."""
        num_rows = len(rows) + others
        if min(budget, self.most, len(rows)) <= 0 or self._worth(num_rows) > self._chances().max():
            return Guesses.none(len(rows))
        found = [self._look_up(row, most) for row, most in zip(rows.tolist(), room.tolist(), strict=True)]
        matches = np.asarray([match for match, _ in found])
        counts = self._choose(matches, np.asarray([len(tokens) for _, tokens in found]), num_rows, budget)
        tokens = np.zeros((len(rows), counts.max()), np.int64)
        for row, count, (_, guessed) in zip(tokens, counts.tolist(), found, strict=True):
            row[:count] = guessed[:count]
        return Guesses(tokens, counts, matches)

    def learn(self, guesses: Guesses, stood: np.ndarray) -> None:
        """Of each row's guesses the first `stood` (R,) did."""
        self.num_drafted += int(guesses.counts.sum())
        self.num_accepted += int(stood.sum())
        for i in np.flatnonzero(guesses.counts).tolist():
            match, right = int(guesses.matches[i]), int(stood[i])
            for place in range(
                min(right + 1, int(guesses.counts[i]))
            ):  # what follows a wrong one was no trial
                length = min(match + place, _LONGEST)
                self._tried[length] += 1
                self._stood[length] += place < right
                if self._tried[length] > 2 * _HALF_LIFE:
                    self._tried[length] /= 2
                    self._stood[length] /= 2

    def finished(self, job: Job) -> None:
        """Keep a request's responses for those to the same prompt that come later."""
        if not self.most:
            return
        samples = self._samples
        written = [samples.tokens[row, : samples.count[row]].astype(np.int32) for row in job.rows.tolist()]
        self._earlier.keep(job.prompt, written)
        for learnt in (self._tried, self._stood):  # what never stood is tried again, some day
            learnt += (_HOPE - learnt) * _FORGET

    def forget(self, job: Job) -> None:
        """A request is no longer in work."""
        self._texts.pop(job.number, None)

    def _worth(self, num_rows: int) -> float:
        """The chance from which on a guess in a pass of `num_rows` rows makes tokens for less time than the pass does:
        time is rows_of_a_pass + rows, and what each row makes is 1."""
        return num_rows / (num_rows + self._rows_of_a_pass)

    def _chances(self) -> np.ndarray:
        return self._stood / self._tried

    def _look_up(self, row: int, room: int) -> tuple[int, list[int]]:
        """How long a text that goes on from here was alike, and how it went on."""
        job = self._samples.job[row]
        assert job is not None, f"row {row} is free"
        if job.number not in self._texts:
            self._texts[job.number] = self._begin(job)
        texts = self._texts[job.number]
        if texts is None or room <= 0:
            return 0, []
        for i, other in enumerate(job.rows.tolist(), texts.num_earlier):
            texts.extend(i, self._samples.tokens[other], int(self._samples.count[other]))
        own = texts.num_earlier + int(np.flatnonzero(job.rows == row)[0])
        return texts.continuation(own, min(room, self.most))

    def _begin(self, job: Job) -> _Texts | None:
        if is_special(job.request.params):
            return None
        return _Texts(job.prompt.tolist(), self._earlier.find(job.prompt), len(job.rows))

    def _choose(self, matches: np.ndarray, lengths: np.ndarray, num_rows: int, budget: int) -> np.ndarray:
        """(R,) how many of each row's guesses to run."""
        chances = self._chances()
        place = np.arange(lengths.max(initial=0))
        each = chances[np.minimum(matches[:, None] + place, _LONGEST)]
        together = np.where(
            place < lengths[:, None], each.cumprod(-1), 0.0
        )  # that it and all before it stand
        best_first = np.sort(together.ravel())[::-1][:budget]
        worth = self._worth(num_rows + np.arange(len(best_first)))
        taken = int((best_first > worth).cumprod().sum())
        if not taken:
            return np.zeros(len(matches), np.int64)
        counts = (together >= best_first[taken - 1]).sum(-1)
        surplus = int(counts.sum()) - taken  # of equals with the last one
        for row in np.flatnonzero(counts)[::-1].tolist():
            while surplus and counts[row] and together[row, counts[row] - 1] == best_first[taken - 1]:
                counts[row] -= 1
                surplus -= 1
        return counts


class _Texts:
    """What was written after one prompt, and where in it which words stand: the prompt first, then earlier responses, then
    those of the group as they grow. A response begins with the end of the prompt."""

    def __init__(self, prompt: list[int], earlier: list[np.ndarray], samples: int) -> None:
        tail = prompt[-_LONGEST:]
        self.num_earlier = 1 + len(earlier)
        self._texts: list[list[int]] = [[], *(list(tail) for _ in range(len(earlier) + samples))]
        self._tail = len(tail)
        self._places: tuple[dict[tuple[int, ...], list[tuple[int, int]]], ...] = tuple({} for _ in _GRAMS)
        self._append(0, prompt)
        for i, response in enumerate(earlier, 1):
            self._append(i, response.tolist())

    def extend(self, which: int, tokens: np.ndarray, count: int) -> None:
        """Response `which` now has `count` tokens."""
        known = len(self._texts[which]) - self._tail
        if count > known:
            self._append(which, tokens[known:count].tolist())

    def continuation(self, own: int, most: int) -> tuple[int, list[int]]:
        """The longest match of the end of text `own` that something follows, the newest of equals, and what does."""
        text, best, found = self._texts[own], 0, []
        for size, places in zip(_GRAMS, self._places, strict=True):
            for which, at in reversed(places.get(tuple(text[-size:]), ())):
                other = self._texts[which]
                if at >= len(other):
                    continue
                match = size
                longest = min(_LONGEST, at, len(text))
                while match < longest and other[at - match - 1] == text[-match - 1]:
                    match += 1
                if match > best:
                    best, found = match, other[at : at + most]
            if best:
                break
        return best, found

    def _append(self, which: int, tokens: list[int]) -> None:
        text = self._texts[which]
        if len(text) == self._tail and which:
            self._note(which)  # the end of the prompt, and how this response goes on
        for token in tokens:
            text.append(token)
            self._note(which)

    def _note(self, which: int) -> None:
        """The place after the last token of a text."""
        text = self._texts[which]
        for size, places in zip(_GRAMS, self._places, strict=True):
            if len(text) >= size:
                found = places.setdefault(tuple(text[-size:]), [])
                found.append((which, len(text)))
                if len(found) > _PLACES:
                    del found[0]


class _Earlier:
    """The newest responses to each prompt; those to prompts seen longest ago go first."""

    def __init__(self) -> None:
        self._responses: OrderedDict[bytes, list[np.ndarray]] = OrderedDict()
        self._num_tokens = 0

    def find(self, prompt: np.ndarray) -> list[np.ndarray]:
        return self._responses.get(prompt_digest(prompt), [])

    def keep(self, prompt: np.ndarray, responses: list[np.ndarray]) -> None:
        """Instead of what was kept for the prompt."""
        name = prompt_digest(prompt)
        self._num_tokens -= sum(map(len, self._responses.pop(name, [])))
        self._responses[name] = responses
        self._num_tokens += sum(map(len, responses))
        while self._num_tokens > _MOST_TOKENS:
            _, oldest = self._responses.popitem(last=False)
            self._num_tokens -= sum(map(len, oldest))
