"""Built-in tasks: rows are right, disjoint between splits, and a pure function of the arguments."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.tasks import TASKS
from rlhf.recipe.schema import BuildTokenizerConfig
from rlhf.reward.gsm8k import final_number

chain_arithmetic = TASKS["chain_arithmetic"]

GOLDEN = [
    {
        "id": "train/0",
        "prompt": "9-7+4+4=",
        "answer": "10",
        "response": "9-7=2 2+4=6 6+4=10####10",
        "chosen": "9-7=2 2+4=6 6+4=10####10",
        "rejected": "####13",
        "judged": "9-7=2 2+4=6 6+4=10####10",
        "label": True,
        "verdict": "+",
        "completions": ["9-7=2", "2+4=6", "6+4=10"],
        "labels": [True, True, True],
    },
    {
        "id": "train/1",
        "prompt": "9+3+3+5=",
        "answer": "20",
        "response": "####17",
        "chosen": "9+3=12 12+3=15 15+5=20####20",
        "rejected": "9+3=9 9+3=12 12+5=17####17",
        "judged": "9+3=12 12+3=15 15+5=20####20",
        "label": True,
        "verdict": "+",
        "completions": ["9+3=12", "12+3=15", "15+5=20"],
        "labels": [True, True, True],
    },
]


def _evaluate(chain: str) -> list[int]:
    """Running totals of a chain, read character by character."""
    totals = [int(chain[0])]
    for i in range(1, len(chain), 2):
        totals.append(totals[-1] + (1 if chain[i] == "+" else -1) * int(chain[i + 1]))
    return totals


@settings(max_examples=30, deadline=None)
@given(
    terms=st.integers(3, 8),
    ops=st.sampled_from(["+-", "+"]),
    seed=st.integers(0, 9),
    split=st.sampled_from(["train", "eval"]),
)
def test_rows_are_right(terms: int, ops: str, seed: int, split: str) -> None:
    """Catches a wrong step, a negative total, a marker the rule does not read, and a character outside the
    alphabet."""
    for row in chain_arithmetic(count=20, terms=terms, ops=ops, seed=seed, split=split):
        chain = row["prompt"].removesuffix("=")
        totals = _evaluate(chain)
        assert len(totals) == terms
        assert min(totals) >= 0
        assert row["answer"] == str(totals[-1])
        assert final_number(row["response"]) == totals[-1]
        work = row["response"].removesuffix(f"####{totals[-1]}").split(" ")
        ends = [
            f"{a}{chain[1 + 2 * i : 3 + 2 * i]}={b}"
            for i, (a, b) in enumerate(zip(totals, totals[1:], strict=False))
        ]
        assert work == ends
        assert set(row["prompt"] + row["response"]) <= set(BuildTokenizerConfig().alphabet)


def test_pairs_labels_and_steps_are_true() -> None:
    """Catches: a slip that changes nothing, a right answer called wrong, steps of another answer than the judged one,
    only one kind of mistake, and labels that begin to be wrong a step too late."""
    rows = chain_arithmetic(count=300, terms=5)
    guesses = [row["rejected"].startswith("####") for row in rows]
    assert 0.4 < sum(guesses) / 300 < 0.6 and 0.4 < sum(row["label"] for row in rows) / 300 < 0.6
    for row, guess in zip(rows, guesses, strict=True):
        assert final_number(row["chosen"]) == int(row["answer"]) != final_number(row["rejected"])
        assert row["judged"] == row["chosen" if row["label"] else "rejected"]
        steps = " ".join(row["completions"])
        assert row["judged"].startswith(steps + "####") or (guess and not row["label"])
        worked = row["chosen"].partition("####")[0].split(" ")
        same = [step == right for step, right in zip(row["completions"], worked, strict=True)]
        assert row["labels"] == same  # a slip is carried on: later steps differ too
        assert all(same) == row["label"]
        assert set(row["rejected"] + steps) <= set(BuildTokenizerConfig().alphabet)


def test_rows_are_these() -> None:
    """Catches a change of the generator, which would silently change every run that uses it."""
    assert chain_arithmetic(count=2, seed=1, lazy_frac=0.5) == GOLDEN


def test_rows_are_the_same_in_another_process() -> None:
    """Catches a dependence on hash randomisation or on global random state."""
    code = (
        "import sys; from rlhf.data.tasks import TASKS;"
        "print(TASKS['chain_arithmetic'](count=30, lazy_frac=0.5));"
        "assert not {'torch', 'datasets'} & sys.modules.keys(), 'a recipe check would load them'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(chain_arithmetic(count=30, lazy_frac=0.5))


def test_a_longer_set_begins_with_the_shorter_one() -> None:
    assert chain_arithmetic(count=100, lazy_frac=0.3)[:40] == chain_arithmetic(count=40, lazy_frac=0.3)


def test_splits_share_no_chain_under_any_seeds() -> None:
    """Catches a split drawn with the seed: training would then contain held-out chains of another seed."""
    train = {row["prompt"] for seed in range(5) for row in chain_arithmetic(count=300, terms=3, seed=seed)}
    held_out = {row["prompt"] for row in chain_arithmetic(count=60, terms=3, split="eval", seed=7)}
    assert len(held_out) == 60
    assert not train & held_out


def test_chains_and_ids_are_distinct() -> None:
    rows = chain_arithmetic(count=1000, terms=3)
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 1000


def test_the_lazy_share_is_wrong_without_working_and_moves_nothing_else() -> None:
    """Catches lazy guesses that happen to be right, and a share that changes which chains are drawn."""
    worked, mixed = chain_arithmetic(count=2000), chain_arithmetic(count=2000, lazy_frac=0.4)
    lazy = [row for row in mixed if row["response"].startswith("####")]
    assert 0.37 < len(lazy) / 2000 < 0.43
    for row in lazy:
        guess = final_number(row["response"])
        assert guess >= 0
        assert 1 <= abs(guess - int(row["answer"])) <= 3
    assert [(r["id"], r["prompt"], r["answer"]) for r in mixed] == [
        (r["id"], r["prompt"], r["answer"]) for r in worked
    ]
    kept = [(m, w) for m, w in zip(mixed, worked, strict=True) if not m["response"].startswith("####")]
    assert all(m == w for m, w in kept)
    assert all(row["response"].startswith("####") for row in chain_arithmetic(count=50, lazy_frac=1.0))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "count: task chain_arithmetic needs it"),
        ({"count": 5, "trems": 3}, r"trems: .* no such argument; did you mean terms\?"),
        ({"count": 5, "wxyz": 3}, "wxyz: .* no such argument; it has count, split, terms"),
        ({"count": 0}, "count: 0 is not above 0"),
        ({"count": 5, "terms": 1, "ops": "*"}, r"terms: 1 is not at least 2; ops: '\*' is not one of"),
        ({"count": 5, "split": "test"}, "split: 'test' is not one of train, eval"),
        ({"count": 5, "lazy_frac": 1.5}, "lazy_frac: 1.5 is not at most 1"),
        ({"count": 5, "split": "eval", "lazy_frac": 0.5}, "lazy_frac=0.5 is for split: train"),
        (
            {"count": 1000, "terms": 2},
            "count=1000, but .* make 162 chains at most; lower count or raise terms",
        ),
        (
            {"count": 150, "terms": 2},
            r"count=150, but only \d+ different chains .*; lower count or raise terms",
        ),
    ],
)
def test_wrong_arguments_are_named(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain_arithmetic(**args)
