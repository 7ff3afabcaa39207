"""A curriculum by pass rate: rows that are too easy or too hard are mostly passed over.

How often each row's responses passed is remembered; the rows are visited in the order of `rlhf.data.cursor`, and each is
taken with a chance that depends on its rate alone. What comes next is a function of (seed, rows visited so far, rates), and
the rates are part of the checkpoint. Not here: rewards (`rlhf.reward`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rlhf import rng
from rlhf.data.cursor import rows_from
from rlhf.recipe.schema import CurriculumConfig
from rlhf.records import Rollout

_UNTRIED = -1.0


class Curriculum:
    """Pass rates of a dataset's rows, and which row comes next. `ids` are the rows' prompt ids; rows of one id share a
    rate."""

    def __init__(self, config: CurriculumConfig, ids: Sequence[str], *, seed: int) -> None:
        self._config, self._seed = config, seed
        self._number = {name: i for i, name in enumerate(dict.fromkeys(ids))}
        self._rows = np.array([self._number[name] for name in ids])
        self._rates = np.full(len(self._number), _UNTRIED)
        self._taken = self._passed_over = 0

    def next_rows(self, position: int, count: int) -> tuple[list[int], int]:
        """The next `count` rows after `position` rows were visited, and how many then were.

        Once as many rows as the dataset has were passed over, the rest are taken as they come.
        """
        rows: list[int] = []
        passed_over = 0
        while len(rows) < count:
            for row in rows_from(
                len(self._rows), seed=self._seed, position=position, count=count - len(rows)
            ):
                if passed_over >= len(self._rows) or self._draw(position) < self.chance(row):
                    rows.append(row)
                else:
                    passed_over += 1
                position += 1
        self._taken, self._passed_over = self._taken + count, self._passed_over + passed_over
        return rows, position

    def chance(self, row: int) -> float:
        """That a row is taken: 1 where it was never tried, at least `revisit` for every other.

        window: 1 where low <= p <= high. variance: 4 p (1 - p), the variance of the reward as a share of the largest.
        """
        config, rate = self._config, float(self._rates[self._rows[row]])
        if rate == _UNTRIED:
            return 1.0
        wanted = (
            float(config.low <= rate <= config.high) if config.kind == "window" else 4.0 * rate * (1.0 - rate)
        )
        return max(wanted, config.revisit)

    def remember(self, rollouts: Sequence[Rollout]) -> None:
        """Move the rates of the rollouts' prompts towards the share that passed now; missing rewards say nothing."""
        passed: dict[int, list[bool]] = defaultdict(list)
        for r in rollouts:
            if r.reward is not None:
                passed[self._number[r.prompt.id]].append(r.reward > self._config.correct_above)
        for number, results in passed.items():
            now, before = sum(results) / len(results), self._rates[number]
            mix = 1.0 if before == _UNTRIED else self._config.mix
            self._rates[number] = before + mix * (now - before)

    def take_metrics(self) -> dict[str, float]:
        """`data/*` of what was remembered, and of the rows visited since the last call."""
        tried = self._rates[self._rates != _UNTRIED]
        visited = self._taken + self._passed_over
        metrics = {
            "data/tried_frac": len(tried) / len(self._rates),
            "data/passed_over_frac": self._passed_over / visited if visited else 0.0,
        }
        if len(tried):
            metrics["data/pass_rate_mean"] = float(tried.mean())
        self._taken = self._passed_over = 0
        return metrics

    def state(self) -> dict[str, torch.Tensor]:
        return {"pass_rates": torch.from_numpy(self._rates.copy())}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for the rates of another dataset."""
        rates = state["pass_rates"].numpy()
        if rates.shape != self._rates.shape:
            raise ValueError(
                f"the saved pass rates are of {len(rates)} prompts, the data has {len(self._rates)}"
            )
        self._rates = rates.copy()

    def _draw(self, position: int) -> float:
        return float(rng.generator(self._seed, "curriculum", position).random())
