"""Steps: a label for each, at the last token of it."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.data import load_steps
from rlhf.recipe.schema import DatasetConfig

ROW = {"prompt": "one", "completions": ["two", "three four"], "labels": [True, False]}


def _load(tokenizer: Any, *rows: Any, max_context: int | None = None, **config: Any):
    config = DatasetConfig(**{"path": "handed over", **config})
    return load_steps(config, tokenizer, name="train", max_context=max_context, rows=list(rows))


@pytest.mark.parametrize("separator", ["\n", "", " <|end|>"])
def test_each_label_stands_at_the_end_of_its_step(byte_tokenizer: Any, separator: str) -> None:
    """Catches: labels one step or one token off, and a step that ends before its separator."""
    tokenizer = byte_tokenizer()
    example = _load(tokenizer, ROW, step_separator=separator)[0]
    assert tokenizer.decode(example.prompt_ids) == "one"
    assert example.step_labels == (1.0, 0.0)
    first, last = example.step_ends
    assert tokenizer.decode(example.response_ids[: first + 1]) == "two" + separator
    assert tokenizer.decode(example.response_ids[first + 1 : last + 1]) == "three four" + separator
    assert last == len(example.response_ids) - 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [True]}, "column 'labels' has 1 labels for 2 steps"),
        ({"labels": [True, -1]}, "the label of step 1 is -1; a label is true or false, or from 0 to 1"),
        ({"labels": [float("nan"), 1]}, "the label of step 0 is nan"),
        ({"labels": ["yes", 1]}, "the label of step 0 is 'yes'"),
        ({"labels": None}, "column 'labels' is None"),
        ({"completions": "two", "labels": [1]}, "column 'completions' is 'two', not a list"),
        ({"completions": [], "labels": []}, r"column 'completions' is \[\], not a list"),
        ({"completions": ["two", " "]}, "step 1 is empty"),
        ({"completions": ["two", 3]}, "step 1 is a int, not text"),
    ],
)
def test_wrong_steps_are_bad_rows(byte_tokenizer: Any, change: dict, reason: str) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=f"row train/1: .*{reason}"):
        _load(tokenizer, ROW, ROW | change)
    assert _load(tokenizer, ROW, ROW | change, bad_rows="skip").counts["bad_rows"] == 1


def test_labels_all_one_way_and_length(byte_tokenizer: Any) -> None:
    """Catches: a model that learns a constant, and a row longer than the context."""
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="the label of every step is 1, so there is nothing to tell apart"):
        _load(tokenizer, ROW | {"labels": [1, True]})
    example = _load(tokenizer, ROW)[0]
    length = len(example.prompt_ids) + len(example.response_ids)
    assert _load(tokenizer, ROW, max_context=length).counts["kept"] == 1
    with pytest.raises(ValueError, match="none of 1 rows is left"):
        _load(tokenizer, ROW, max_context=length - 1)
