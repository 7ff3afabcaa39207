"""The GSM8K rule against 5,276 human-checked verdicts, against cases read by hand, and against hostile
text."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from rlhf.reward.gsm8k import final_number, is_correct

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the GSM8K files are not at {DATA}")


def _verdicts() -> list[tuple[str, str, bool]]:
    """(solution, reference, is_correct) of every model solution."""
    rows = [json.loads(line) for line in (DATA / "example_model_solutions.jsonl").read_text().splitlines()]
    return [
        (verdict["solution"], row["ground_truth"], verdict["is_correct"])
        for row in rows
        for verdict in row.values()
        if isinstance(verdict, dict)
    ]


@needs_data
def test_agrees_with_every_human_verdict() -> None:
    """Catches a normalisation that is too strict (`18.0`, `1,234`, `$5`) or too loose (any number in the
    text)."""
    verdicts = _verdicts()
    disagreements = [v for v in verdicts if is_correct(v[0], v[1]) != v[2]]
    assert len(verdicts) == 5276
    assert disagreements == []


@needs_data
@pytest.mark.parametrize("name", ["train", "test"])
def test_reads_every_reference(name: str) -> None:
    """Catches a marker or a thousands comma that the rule does not read: such a row could never be
    rewarded."""
    for line in (DATA / f"{name}.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        assert final_number(answer) == int(answer.rpartition("####")[2].replace(",", ""))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7+5=12 12-3=9 9+9=18####18", 18),
        ("#### 18", 18),
        ("####\n18", 18),
        ("#### -3", -3),
        ("#### \u22123", -3),  # typographic minus
        ("#### $1,234.50", Fraction("1234.5")),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### 18.00", 18),
        ("#### 18.", 18),
        ("#### 50%", 50),
        ("#### **18**", 18),
        ("#### 18 eggs", 18),
        ("#### x = 18", 18),
        ("#### 1/4", Fraction(1, 4)),
        ("#### .5", Fraction(1, 2)),
        ("#### 1,234,567", 1234567),
        ("#### 7\nA: 8\n#### 9", 9),  # the last marker counts
        ("12 cows\nA: 24", 24),
        ("in the USA: 5 of them, 7 in all", 7),  # A: is a marker at the beginning of a line only
        ("so she pays 20-2", 2),  # an operator, not a sign
        ("The answer is 3,000.", 3000),
        (r"\boxed{42}", 42),
    ],
)
def test_reads_the_final_number(text: str, number: Fraction | int) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number",
        "18 ####",  # the marker promises an answer that does not come
        "#### ",
        "#### 9+9",
        "#### 9 + 9",
        "#### 2*3",
        "#### 1,2",
        "#### 10-20",
        "#### 2 million",
        "#### 10+John's age",
        "#### 1/0",
        "#### " + "9" * 200,
        "#### \u0661\u0662",  # digits of another script
    ],
)
def test_finds_no_number(text: str) -> None:
    """Catches half an expression or a list taken for an answer, which a policy would learn to exploit."""
    assert final_number(text) is None


def test_a_reference_without_a_number_is_a_fault_not_a_zero() -> None:
    with pytest.raises(ValueError, match="holds no final number"):
        is_correct("#### 5", "unknown")


@pytest.mark.parametrize(
    "text",
    [
        "9" * 10**6,
        "1," * 10**6,
        "-" * 10**6,
        "#### " * 10**5,
        "1/" * 10**6,
        "####" + " " * 10**6,
        "A:\n" * 10**5,
    ]
    + [
        "\n" * 10**6,
        "1,234" * 10**5,
        "####5" + " " * 10**6,
        "$" * 10**6,
        "." * 10**6,
        "####" + "1,000" * 10**5,
    ],
    ids=range(13),
)
def test_time_is_linear_in_hostile_text(text: str) -> None:
    """Catches a regular expression that backtracks: a quadratic one would need hours on these."""
    start = time.perf_counter()
    final_number(text)
    assert time.perf_counter() - start < 5
