"""A judge: a language model that reads a prompt and a response, or two, and is asked for a verdict (RLAIF, arXiv
2309.00267).

Here: what it reads, as text (`Judge`, where the rollouts are) and as tokens (`JudgeReader`, where the model is), and what
of its verdicts becomes a reward. Not here: loading the model (`rlhf.trainers.worker`), the formulas (`rlhf.verdicts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.batching import SftExample, make_sft_batch, plan_micro_batches
from rlhf.logprobs import batch_logits
from rlhf.recipe.schema import JudgeConfig
from rlhf.records import Rollout
from rlhf.verdicts import verdict_probabilities, win_rates

# (n,) texts -> (n, 2): probability of the good verdict, and how much probability both verdicts have; NaN = too long.
Ask = Callable[[Sequence[str]], torch.Tensor]


class Judge:
    """Scores rollouts from 0 to 1: the probability of the good verdict on each response, or with a template for two the
    mean probability of beating another response to the same prompt, both orders averaged."""

    missing = "its text is longer than the judge's context"

    def __init__(self, config: JudgeConfig, ask: Ask) -> None:
        self._config, self._ask = config, ask
        self.stats: dict[str, float] = {}

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One number for each rollout, in order; NaN where the judge could not read it, or one that it is compared with.
        The responses to one prompt of a step stand together. Raises ValueError for a response without another."""
        return self._compared(rollouts) if self._config.compares else self._alone(rollouts)

    def _alone(self, rollouts: Sequence[Rollout]) -> list[float]:
        answers = self._ask([self._text(r, response=r.response_text) for r in rollouts])
        self.stats = {"judge/verdict_mass": _mean(answers[:, 1])}
        return answers[:, 0].tolist()

    def _compared(self, rollouts: Sequence[Rollout]) -> list[float]:
        groups = [list(group) for _, group in groupby(rollouts, key=lambda r: r.sample_id.rpartition("/")[0])]
        places = [
            (g, i, j)
            for g, group in enumerate(groups)
            for i in range(len(group))
            for j in range(len(group))
            if i != j
        ]
        shown = [(groups[g][i], groups[g][j]) for g, i, j in places]
        answers = self._ask([self._text(a, first=a.response_text, second=b.response_text) for a, b in shown])
        first_wins: list[dict[tuple[int, int], float]] = [{} for _ in groups]
        for (g, i, j), p in zip(places, answers[:, 0].tolist(), strict=True):
            first_wins[g][i, j] = p
        gaps = [abs(wins[i, j] + wins[j, i] - 1.0) for wins in first_wins for i, j in wins if i < j]
        self.stats = {
            "judge/verdict_mass": _mean(answers[:, 1]),
            "judge/order_gap": _mean(torch.tensor(gaps)),
        }
        return [
            rate
            for group, wins in zip(groups, first_wins, strict=True)
            for rate in win_rates(len(group), wins)
        ]

    def _text(self, rollout: Rollout, **responses: str) -> str:
        return self._config.template.format(prompt=rollout.prompt.text, **responses)


class JudgeReader:
    """Tokens of what a judge reads, and the verdict in its next-token distribution.

    Raises ValueError for a verdict that is not one token, and for a judge without a chat template that is to use one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: JudgeConfig) -> None:
        self.tokenizer, self._config = tokenizer, config
        if config.chat_template and not tokenizer.chat_template:
            raise ValueError(f"judge.chat_template: the tokenizer of {config.path} has none; set it to false")
        self._good_id, self._bad_id = (self._verdict_id(text) for text in config.verdict_texts)
        if self._good_id == self._bad_id:
            raise ValueError(
                f"judge.verdicts: {config.verdict_texts} are the same token; give two that differ"
            )

    @torch.no_grad()
    def ask(
        self, model: torch.nn.Module, texts: Sequence[str], *, max_tokens: int, device: torch.device | str
    ) -> torch.Tensor:
        """(n, 2) fp32 on the CPU as `rlhf.verdicts.verdict_probabilities` gives it; NaN for a text beyond the context.
        `max_tokens` bounds a forward pass; what is packed together changes nothing."""
        context = model.config.get_text_config().max_position_embeddings
        ids = [self._tokens(text) for text in texts]
        fitting = [i for i, tokens in enumerate(ids) if len(tokens) < context]
        answers = torch.full((len(texts), 2), torch.nan)
        if not fitting:
            return answers
        lengths = [len(ids[i]) + 1 for i in fitting]
        for micro in plan_micro_batches(lengths, num_processes=1, max_tokens=max_tokens)[0]:
            rows = [fitting[place] for place in micro]
            batch = make_sft_batch([SftExample(str(i), ids[i], (self._good_id,)) for i in rows]).to(device)
            _, logits = batch_logits(model, batch, targets=batch.loss_mask)
            answers[rows] = verdict_probabilities(logits, self._good_id, self._bad_id).cpu()
        return answers

    def _tokens(self, text: str) -> tuple[int, ...]:
        if not self._config.chat_template:
            return tuple(self.tokenizer.encode(text))
        turn = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer.encode(rendered, add_special_tokens=False))

    def _verdict_id(self, text: str) -> int:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"judge.verdicts: {text!r} is {len(ids)} tokens of {self._config.path}; a verdict must be one token, often "
                "with the space before it"
            )
        return ids[0]


def _mean(values: torch.Tensor) -> float:
    return float(values.nanmean())
