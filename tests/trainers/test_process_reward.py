"""A process reward model's verdicts on steps, as a reward: where steps end, and what is made of their probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.recipe.schema import RewardModelConfig
from rlhf.records import Prompt, Rollout
from rlhf.trainers.process_reward import in_steps, model_part

LETTERS = "abcdefghijklmnopqrstuvwxyz\n "


def tokenizer(text: str, **_) -> dict[str, list[int]]:
    return {"input_ids": [LETTERS.index(c) for c in text]}


def answer(text: str) -> Rollout:
    return Rollout(f"0/0/{text}", Prompt("p", (30, 31), "?"), (7,), (True,), (0.0,), (0,), "stop", text)


class Judge:
    """Says of a step what its first letter's place says: a = logit 0, b = 1, ..."""

    def __init__(self, separator: str | None = "\n") -> None:
        self._separator, self.batches = separator, []

    def step_separator(self) -> str | None:
        return self._separator

    def step_scores(self, batch) -> torch.Tensor:
        self.batches.append(batch)
        scores = torch.full(batch.token_ids.shape, 99.0)
        for i, row in enumerate(batch.loss_mask):
            start = 2
            for end in row.nonzero()[:, 0].tolist():
                scores[i, end] = float(batch.token_ids[i, start])
                start = end + 1
        return scores

    def score(self, batch) -> torch.Tensor:
        return torch.full((len(batch),), 0.125)


def part(judge: Judge, **settings):
    return model_part(RewardModelConfig(path="prm", **settings), judge, tokenizer)


def p(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        (None, [p(0), p(3)]),
        ("min", [p(0), p(3)]),
        ("product", [p(2) * p(0) * p(1), p(3)]),
        ("last", [p(1), p(3)]),
    ],
)
def test_the_steps_probabilities_become_one_reward(steps, want):
    """Would catch: the last token's score alone taken, logits for probabilities, the padding of a shorter response among
    its steps."""
    scores = part(Judge(), steps=steps).score([answer("cx\nay\nbz"), answer("d")])
    assert scores == pytest.approx(want)


def test_a_response_is_read_as_the_training_rows_were():
    """Would catch: a last step without its separator, blank lines as steps, steps tokenised across their border, an end at
    the token before."""
    example = in_steps(answer("ab\n\ncd\n"), lambda text: tokenizer(text)["input_ids"], "\n")
    assert example.prompt_ids == (30, 31)
    assert example.response_ids == (0, 1, 26, 2, 3, 26) and example.step_ends == (2, 5)
    empty = in_steps(answer(" \n"), lambda text: tokenizer(text)["input_ids"], "\n")
    assert empty.response_ids == (26,) and empty.step_ends == (0,)


def test_another_reward_model_judges_whole_responses():
    """Would catch: every reward model asked for steps."""
    judge = Judge(separator=None)
    assert part(judge, weight=2.0).score([answer("a\nb")]) == [0.125] and not judge.batches


@pytest.mark.parametrize(
    ("separator", "settings", "message"),
    [
        (None, {"steps": "min"}, "judges whole responses"),
        ("\n", {"normalize": True}, "no scale to be divided by"),
        ("", {}, "an empty step_separator"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(separator, settings, message):
    """Would catch: a setting that is silently passed over, one reward for a response that was never cut."""
    with pytest.raises(ValueError, match=message):
        part(Judge(separator), **settings)
