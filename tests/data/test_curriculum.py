"""Which rows a curriculum takes, and what it remembers."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.data import Curriculum, rows_from
from rlhf.recipe.schema import CurriculumConfig
from rlhf.records import Prompt, Rollout

N = 40
IDS = [f"train/{i}" for i in range(N)]


def made(ids=IDS, **settings) -> Curriculum:
    return Curriculum(CurriculumConfig(**settings), ids, seed=3)


def results(row: int, *rewards: float | None, ids=IDS) -> list[Rollout]:
    prompt = Prompt(id=ids[row], token_ids=(1,), text="?")
    return [
        Rollout(f"0/{row}/{i}", prompt, (2,), (True,), (0.0,), (0,), "stop", reward=r)
        for i, r in enumerate(rewards)
    ]


def test_untried_rows_come_in_the_usual_order():
    """Would catch: another order than the cursor's, rows that are lost between two steps."""
    curriculum, position, rows = made(), 0, []
    for _ in range(5):
        taken, position = curriculum.next_rows(position, 7)
        rows += taken
    assert rows == rows_from(N, seed=3, position=0, count=35) and position == 35


def test_rows_outside_the_window_are_passed_over():
    """Would catch: bounds that are off, low and high swapped, a rate remembered for another row."""
    curriculum = made(low=0.25, high=0.75, revisit=0.0)
    for row in range(N):
        curriculum.remember(results(row, *[1.0] * (row % 5), *[0.0] * (4 - row % 5)))
    rows, position = curriculum.next_rows(0, 20)
    assert {row % 5 for row in rows} == {1, 2, 3}
    assert rows == [r for r in rows_from(N, seed=3, position=0, count=position) if r % 5 in (1, 2, 3)]
    metrics = curriculum.take_metrics()
    assert metrics == {
        "data/tried_frac": 1.0,
        "data/pass_rate_mean": 0.5,
        "data/passed_over_frac": pytest.approx((position - 20) / position),
    }
    assert curriculum.take_metrics()["data/passed_over_frac"] == 0.0


def test_chances_are_the_variance_and_at_least_revisit():
    """Would catch: p (1 - p) without its factor, a floor that is not one, draws that are all equal."""
    curriculum = made(kind="variance", revisit=0.05)
    for row, rate in enumerate((0.0, 0.25, 0.5, 1.0)):
        curriculum.remember(results(row, *[1.0] * int(4 * rate), *[0.0] * int(4 - 4 * rate)))
    assert [curriculum.chance(row) for row in range(5)] == [0.05, 0.75, 1.0, 0.05, 1.0]
    taken, position = np.zeros(N), 0
    while position < 400 * N:
        rows, position = curriculum.next_rows(position, 10)
        np.add.at(taken, rows, 1)
    assert taken[:4] / 400 == pytest.approx([0.05, 0.75, 1.0, 0.05], abs=0.07)


def test_a_dataset_without_a_fitting_row_still_gives_rows():
    """Would catch: a step that looks for a row for ever."""
    curriculum = made(revisit=0.0)
    for row in range(N):
        curriculum.remember(results(row, 0.0))
    rows, position = curriculum.next_rows(0, 8)
    assert len(rows) == 8 and position == N + 8


def test_rates_move_by_mix_and_missing_rewards_say_nothing():
    curriculum = made(mix=0.25, kind="variance", revisit=0.0)
    curriculum.remember(results(0, 1.0, None, 1.0, 0.0, 0.0))  # 1/2
    curriculum.remember(results(0, 0.0, 0.0))  # 3/8
    curriculum.remember(results(1, None))
    assert curriculum.chance(0) == pytest.approx(4 * 0.375 * 0.625) and curriculum.chance(1) == 1.0


def test_state_goes_on_where_it_was():
    """Would catch: what comes next depending on anything but the position and the rates."""
    one, other = made(kind="variance"), made(kind="variance")
    rows, position = one.next_rows(0, 30)
    for row in rows:
        one.remember(results(row, float(row % 2), 0.0, 0.0))
    other.load_state(one.state())
    assert one.next_rows(position, 25) == other.next_rows(position, 25)
    with pytest.raises(ValueError, match="of 40 prompts, the data has 2"):
        made(ids=["a", "b"]).load_state(one.state())


def test_copies_of_a_row_share_its_rate():
    """Would catch: a row that a mixture shows twice remembered twice."""
    ids = ["a", "b", "a"]
    curriculum = made(ids=ids, revisit=0.0)
    curriculum.remember(results(0, 0.0, ids=ids))
    assert [curriculum.chance(row) for row in range(3)] == [0.0, 1.0, 0.0]
