"""The scorer: a reward that failed is missing and named, never zero; a broken contract stops the run."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.recipe.schema import RewardConfig
from rlhf.records import Prompt, Rollout
from rlhf.reward import RewardError, Scorer


def _rollouts(responses: list[str], **columns: list[Any]) -> list[Rollout]:
    columns = columns or {"answer": ["5"] * len(responses)}
    return [
        Rollout(
            sample_id=f"1/{i}/0",
            prompt=Prompt(
                id=f"train/{i}", token_ids=(1,), text=f"p{i}", row={k: v[i] for k, v in columns.items()}
            ),
            response_ids=(2,),
            response_mask=(True,),
            rollout_logprobs=(0.0,),
            policy_versions=(0,),
            finish_reason="stop",
            response_text=response,
        )
        for i, response in enumerate(responses)
    ]


def _scorer(function: Callable[..., Any], **config: Any) -> Scorer:
    return Scorer([RewardConfig(function="mine", **config)], {"mine": function})


# -- sums, parts, metrics --------------------------------------------------------------------------


def test_reward_is_the_weighted_sum_and_parts_are_not_weighted() -> None:
    """Catches weights applied twice or not at all, and parts that lost their own scale."""
    scorer = Scorer([RewardConfig(function="gsm8k", weight=2.0), RewardConfig(function="format", weight=0.5)])
    right, wrong, plain = scorer.score(_rollouts(["####5", "####4", "5"]))
    assert (right.reward, wrong.reward, plain.reward) == (2.5, 0.5, 2.0)
    assert right.reward_parts == {"gsm8k": 1.0, "format": 1.0}
    assert plain.reward_parts == {"gsm8k": 1.0, "format": 0.0}
    assert scorer.stats == {
        "reward/mean": pytest.approx(5 / 3),
        "reward/std": pytest.approx(np.std([2.5, 0.5, 2.0])),
        "reward/min": 0.5,
        "reward/max": 2.5,
        "reward/gsm8k/mean": pytest.approx(2 / 3),
        "reward/format/mean": pytest.approx(2 / 3),
        "reward/error_frac": 0.0,
        "reward/timeout_frac": 0.0,
    }


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.randoms())
def test_order_of_rollouts_is_kept(values: list[float], random: Any) -> None:
    """Catches results that come back in another order than the responses went in."""
    rollouts = _rollouts([str(v) for v in values])
    random.shuffle(rollouts)
    scored = _scorer(lambda prompts, responses, **_: [float(r) for r in responses]).score(rollouts)
    assert [s.sample_id for s in scored] == [r.sample_id for r in rollouts]
    assert [s.reward for s in scored] == [float(r.response_text) for r in rollouts]


def test_two_parts_of_one_name_are_told_apart() -> None:
    """Catches a second part that overwrites the first in reward_parts."""
    scorer = Scorer([RewardConfig(function="format"), RewardConfig(function="format", args={"pattern": "="})])
    (scored,) = scorer.score(_rollouts(["1=1"]))
    assert scored.reward_parts == {"format": 0.0, "format_2": 1.0}


def test_exact_match_ignores_blanks_at_the_ends_only() -> None:
    scored = Scorer([RewardConfig(function="exact_match")]).score(_rollouts([" 5\n", "5.0", "0 5"]))
    assert [s.reward for s in scored] == [1.0, 0.0, 0.0]


def test_no_rollouts_give_no_stats() -> None:
    scorer = Scorer([RewardConfig(function="gsm8k")])
    assert scorer.score([]) == []
    assert scorer.stats == {}


# -- missing rewards -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 1e30, np.float32("nan")])
def test_a_value_that_is_no_reward_is_missing_not_zero(value: Any) -> None:
    """Catches a NaN that reaches the mean, and None counted as 0."""
    scorer = _scorer(lambda prompts, responses, **_: [1.0] * 5 + [value] + [1.0] * 34)
    scored = scorer.score(_rollouts(["x"] * 40))
    assert scored[5].reward is None
    assert scored[5].reward_parts == {}
    assert scored[5].reward_error.startswith("mine: returned ")
    assert "index 5" in scored[5].reward_error
    assert [s.reward for i, s in enumerate(scored) if i != 5] == [1.0] * 39
    assert scorer.stats["reward/mean"] == 1.0
    assert scorer.stats["reward/error_frac"] == 1 / 40


def test_one_missing_part_makes_the_sum_missing_and_keeps_the_others() -> None:
    """Catches a sum over the parts that happen to be there."""
    scorer = Scorer(
        [RewardConfig(function="gsm8k"), RewardConfig(function="half")],
        {"half": lambda prompts, responses, **_: [None if r == "bad" else 0.5 for r in responses]},
    )
    scored = scorer.score(_rollouts(["####5"] * 30 + ["bad"]))
    assert scored[0].reward == 1.5
    assert scored[30].reward is None
    assert scored[30].reward_parts == {"gsm8k": 0.0}
    assert scored[30].reward_error == "half: returned None at index 30"


def test_a_raising_sample_is_isolated_and_masked(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a whole step lost to one bad response, and a log flooded with the same traceback."""

    def fragile(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        return [1 / len(r) for r in responses]

    scorer = _scorer(fragile)
    with caplog.at_level(logging.ERROR, logger="rlhf.reward"):
        scored = scorer.score(_rollouts(["x"] * 39 + [""]))
        scorer.score(_rollouts(["x"] * 39 + [""]))
    assert [s.reward for s in scored] == [1.0] * 39 + [None]
    assert scored[39].reward_error == "mine: ZeroDivisionError: division by zero"
    assert caplog.text.count("Traceback") == 1 and "in fragile" in caplog.text


def test_above_five_percent_missing_stops() -> None:
    """Catches a run that goes on with a reward service that is down."""
    fine = _scorer(lambda prompts, responses, **_: [None] * 2 + [1.0] * (len(responses) - 2))
    assert sum(s.reward is None for s in fine.score(_rollouts(["x"] * 40))) == 2  # exactly 5 %
    with pytest.raises(
        RewardError,
        match=r"2 of 39 .* missing \(5.1%\).* more than one and more than 5%.*sample 1/0/0: mine: returned None",
    ):
        fine.score(_rollouts(["x"] * 39))


def test_one_missing_reward_of_a_small_step_does_not_stop() -> None:
    scorer = _scorer(lambda prompts, responses, **_: [None] + [1.0] * (len(responses) - 1))
    assert scorer.score(_rollouts(["x"] * 4))[0].reward is None
    with pytest.raises(RewardError, match="1 of 1 rewards are missing"):
        scorer.score(_rollouts(["x"]))


def test_a_reference_that_is_no_number_is_missing_not_wrong() -> None:
    """Catches a fault of the data that teaches the policy that its answer was bad."""
    answers = ["5"] * 29 + ["five", None]
    scored = Scorer([RewardConfig(function="gsm8k")]).score(_rollouts(["####5"] * 30, answer=answers[:30]))
    assert scored[29].reward is None
    assert "holds no final number" in scored[29].reward_error
    scored = Scorer([RewardConfig(function="gsm8k")]).score(
        _rollouts(["####5"] * 30, answer=answers[:29] + [None])
    )
    assert scored[29].reward is None
    assert "column 'answer' is None" in scored[29].reward_error


# -- broken contracts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "mine: returned 1 rewards for 3 responses"),
        ([1.0] * 4, "mine: returned 4 rewards for 3 responses"),
        (None, "mine: returned NoneType, must return a list of 3 numbers"),
        ("111", "mine: returned str"),
        ({0: 1.0}, "mine: returned dict"),
        ([1.0, "0.5", 1.0], r"mine: index 1 is '0.5' \(str\)"),
        ([1.0, 1.0, [1.0]], r"mine: index 2 is \[1.0\] \(list\)"),
        ([1.0, 1j, 1.0], "mine: index 1 is 1j"),
        (torch.ones(3, 2), "index 0 is"),
    ],
)
def test_a_broken_contract_names_function_index_and_value(result: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        _scorer(lambda prompts, responses, **_: result).score(_rollouts(["x"] * 3))


@pytest.mark.parametrize(
    "result",
    [
        (1, 0),
        [True, False],
        np.array([1.0, 0.0]),
        np.array([1, 0]),
        torch.tensor([1.0, 0.0]),
        [np.float32(1), np.bool_(0)],
    ]
    + [[torch.tensor(1.0), torch.tensor([0])]],
    ids=range(7),
)
def test_every_kind_of_number_is_a_reward(result: Any) -> None:
    scored = _scorer(lambda prompts, responses, **_: result).score(_rollouts(["x", "y"]))
    assert [s.reward for s in scored] == [1.0, 0.0]
    assert all(type(s.reward) is float for s in scored)


def test_exit_in_a_function_does_not_end_the_process_unnamed() -> None:
    def leave(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        raise SystemExit(0)

    with pytest.raises(RewardError, match="mine: raised SystemExit"):
        _scorer(leave).score(_rollouts(["x"] * 3))


# -- deadline --------------------------------------------------------------------------------------


def test_a_function_that_blocks_is_named_at_its_deadline(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a step that hangs for ever on a reward, and a thread that keeps the process from ending."""
    release = threading.Event()
    scorer = _scorer(lambda prompts, responses, **_: release.wait(60), timeout_s=0.2)
    start = time.monotonic()
    with pytest.raises(RewardError, match="mine: no result after timeout_s=0.2"):
        scorer.score(_rollouts(["x"] * 3))
    assert "is left running, in" in caplog.text and "release.wait(60)" in caplog.text, (
        "its stack names the place"
    )
    assert time.monotonic() - start < 5
    assert scorer.stats["reward/timeout_frac"] == 1.0
    assert scorer.stats["reward/error_frac"] == 0.0
    assert math.isnan(scorer.stats["reward/mean"])
    assert all(t.daemon for t in threading.enumerate() if t.name == "reward-mine")
    release.set()


def test_after_the_deadline_no_further_call_is_started() -> None:
    """Catches one blocked thread per response, when a function fails fast for all and blocks for each."""
    calls = []

    def slow_alone(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        calls.append(len(responses))
        if len(responses) > 1:
            raise OSError("down")
        time.sleep(0.3)
        return [1.0]

    with pytest.raises(RewardError, match="no result after timeout_s=0.2"):
        _scorer(slow_alone, timeout_s=0.2).score(_rollouts(["x"] * 9))
    assert calls == [9, 1]


# -- columns and arguments -------------------------------------------------------------------------


def test_a_function_gets_the_columns_it_names() -> None:
    """Catches a TypeError from columns that a plain function never asked for."""

    def plain(prompts: list[str], responses: list[str], level: list[int], scale: float = 1.0) -> list[float]:
        return [scale * n for n in level]

    scored = _scorer(plain, args={"scale": 2.0}).score(_rollouts(["x", "y"], level=[1, 2], other=["a", "b"]))
    assert [s.reward for s in scored] == [2.0, 4.0]


def test_a_function_with_keywords_gets_every_column_and_the_prompts() -> None:
    seen = {}

    def all_of_it(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        seen.update(columns, prompts=prompts, responses=responses)
        return [0.0] * len(prompts)

    _scorer(all_of_it, args={"scale": 2}).score(_rollouts(["x", "y"], level=[1, 2], pattern=["a", "b"]))
    assert seen == {
        "prompts": ["p0", "p1"],
        "responses": ["x", "y"],
        "level": [1, 2],
        "pattern": ["a", "b"],
        "scale": 2,
    }


def test_a_missing_column_is_named() -> None:
    def needs(prompts: list[str], responses: list[str], solution: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match=r"mine needs the column 'solution' \(did you mean 'solutions'\?\)"):
        _scorer(needs).score(_rollouts(["x"] * 3, solutions=["1"] * 3))
    with pytest.raises(RewardError, match=r"no column 'answer' \(did you mean 'answers'\?\)"):
        Scorer([RewardConfig(function="gsm8k")]).score(_rollouts(["x"] * 3, answers=["1"] * 3))


def test_a_column_named_like_a_rules_option_does_not_take_its_place() -> None:
    """Catches format judging by a dataset column that happens to be called `pattern`."""
    scorer = Scorer([RewardConfig(function="format")])
    assert scorer.score(_rollouts(["####5"], pattern=["x"]))[0].reward == 1.0


def test_the_reference_column_can_be_named() -> None:
    scorer = Scorer([RewardConfig(function="gsm8k", args={"reference_column": "truth"})])
    assert [s.reward for s in scorer.score(_rollouts(["####5", "####5"], truth=[5, 6.0]))] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        ("gsm8", {}, r"'gsm8' is unknown \(did you mean 'gsm8k'\?\); there are exact_match, format, gsm8k"),
        ("no.such.module:f", {}, "reward module 'no.such.module' does not import"),
        ("no_such_file.py:f", {}, "reward function file 'no_such_file.py' does not exist"),
        ("math:sqr", {}, r"math has no function 'sqr'"),
        ("format", {"patern": "x"}, r"takes no argument 'patern' \(did you mean 'pattern'\?\)"),
        ("gsm8k", {"responses": "x"}, "takes no argument 'responses'"),
        ("one", {}, r"must take \(prompts, responses, \*\*columns\)"),
        ("two", {"scale": 1}, "takes no argument 'scale'; it takes none"),
    ],
)
def test_a_wrong_configuration_is_refused_at_the_start(function: str, args: dict, message: str) -> None:
    functions = {"one": lambda responses, **_: [], "two": lambda prompts, responses: []}
    with pytest.raises(ValueError, match=message):
        Scorer([RewardConfig(function=function, args=args)], functions)


def test_no_reward_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no reward function is configured"):
        Scorer([])


def test_a_function_from_a_file_and_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def length(prompts, responses, **columns):\n    return [float(len(r)) for r in responses]\n"
    (tmp_path / "lengths_of_text.py").write_text(source)
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path}/lengths_of_text.py:length", "lengths_of_text:length"):
        scored = Scorer([RewardConfig(function=name)]).score(_rollouts(["abc"]))
        assert scored[0].reward_parts == {"length": 3.0}
    with pytest.raises(
        ValueError, match=r"has no function 'lenght' \(did you mean 'length'\?\); it has length"
    ):
        Scorer([RewardConfig(function=f"{tmp_path}/lengths_of_text.py:lenght")])
    with pytest.raises(ValueError, match="broken.py' does not load: ModuleNotFoundError"):
        Scorer([RewardConfig(function=f"{tmp_path}/broken.py:f")])
