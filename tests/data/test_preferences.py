"""Pairs and labels: what is one prompt, what are two answers, and which rows say nothing."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.data import load_labels, load_preferences
from rlhf.recipe.schema import DatasetConfig

USER, WELL, BADLY = (
    {"role": r, "content": c} for r, c in (("user", "one"), ("assistant", "two"), ("assistant", "six"))
)
CHAT = {"chat_template": True}


def _pairs(tokenizer: Any, *rows: Any, max_context: int | None = None, **config: Any):
    config = DatasetConfig(**{"path": "handed over", **config})
    return load_preferences(config, tokenizer, name="train", max_context=max_context, rows=list(rows))


def _labels(tokenizer: Any, *rows: Any, max_context: int | None = None, **config: Any):
    config = DatasetConfig(**{"path": "handed over", "response_column": "completion", **config})
    return load_labels(config, tokenizer, name="train", max_context=max_context, rows=list(rows))


def _texts(tokenizer: Any, pair: Any) -> tuple[str, str, str]:
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))


@pytest.mark.parametrize(
    ("row", "config", "prompt"),
    [
        ({"prompt": "one", "chosen": "two", "rejected": "six"}, {}, "one"),
        ({"prompt": "one", "chosen": "two", "rejected": "six"}, CHAT, None),
        ({"prompt": [USER], "chosen": [WELL], "rejected": [BADLY]}, CHAT, None),
        ({"prompt": "one", "chosen": [WELL], "rejected": [BADLY]}, CHAT, None),
        ({"chosen": [USER, WELL], "rejected": [USER, BADLY]}, CHAT, None),
        ({"prompt": "one", "chosen": [USER, WELL], "rejected": [USER, BADLY]}, CHAT, None),
        ({"prompt": [USER], "chosen": [USER, WELL], "rejected": [USER, BADLY]}, CHAT, None),
        (
            {"q": "one", "a": "two", "b": "six"},
            {"prompt_template": "<{q}>", "chosen_column": "a", "rejected_column": "b"},
            "<one>",
        ),
    ],
)
def test_every_form_of_a_pair_is_the_same_pair(
    byte_tokenizer: Any, row: dict, config: dict, prompt: str | None
) -> None:
    """Catches: a prompt that is read twice or not at all, an answer with the header in it, two ends or none."""
    tokenizer = byte_tokenizer()
    rendered = prompt or "<|bos|>user\none<|eos|>\n<|bos|>assistant\n"
    assert _texts(tokenizer, _pairs(tokenizer, row, **config)[0]) == (rendered, "two<|eos|>", "six<|eos|>")


def test_texts_without_a_prompt_are_cut_after_the_words_they_share(byte_tokenizer: Any) -> None:
    """Catches: a cut inside a word, an answer that is empty because the other goes on, and a shared beginning that
    stays in the answers."""
    tokenizer = byte_tokenizer()
    rows = [
        {"chosen": "H: one\n\nA: two", "rejected": "H: one\n\nA: twenty"},
        {"chosen": "one two", "rejected": "one two three"},
    ]
    data = _pairs(tokenizer, *rows)
    assert _texts(tokenizer, data[0]) == ("H: one\n\nA:", " two<|eos|>", " twenty<|eos|>")
    assert _texts(tokenizer, data[1]) == ("one", " two<|eos|>", " two three<|eos|>")
    with pytest.raises(ValueError, match="the two answers do not begin with the same words"):
        _pairs(tokenizer, {"chosen": "one two", "rejected": "six two"})
    with pytest.raises(ValueError, match="which no chat template can part from their prompt"):
        _pairs(tokenizer, *rows, **CHAT)


def test_a_named_prompt_column_must_be_there(byte_tokenizer: Any) -> None:
    """Catches a misspelt prompt column that is taken for data whose answers hold the prompt."""
    with pytest.raises(ValueError, match="no column 'qestion'; did you mean 'question'"):
        _pairs(
            byte_tokenizer(),
            {"question": "one", "chosen": "one two", "rejected": "one six"},
            prompt_column="qestion",
        )
    with pytest.raises(ValueError, match="data.rejected_column: the dataset has no column 'rejected'"):
        _pairs(byte_tokenizer(), {"prompt": "one", "chosen": "two"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "six"}, "columns 'chosen' and 'rejected' are equal, so neither answer is better"),
        ({"rejected": "two<|eos|>"}, "the tokens of both are the same"),
        ({"chosen": " "}, "column 'chosen' is empty"),
        ({"rejected": None}, "column 'rejected' is None"),
        ({"chosen": 5}, "column 'chosen' is a int, not text;"),
        ({"chosen": [WELL]}, "column 'chosen' is a list, not text; set data.chat_template"),
        (
            {"chosen": [WELL], "rejected": [BADLY]},
            "column 'chosen' is a list, not text; set data.chat_template",
        ),
        ({"margin": None}, "column 'margin' is None"),
        ({"margin": float("nan")}, "column 'margin' is nan; a margin is a finite number"),
        ({"margin": True}, "column 'margin' is True; a margin is a finite number"),
        ({"margin": "1"}, "column 'margin' is '1'; a margin is a finite number"),
    ],
)
def test_pairs_that_say_nothing_are_bad_rows(byte_tokenizer: Any, change: dict, reason: str) -> None:
    """Catches: a pair of equal answers (its gradient is zero, its accuracy a half), in text or in tokens."""
    tokenizer = byte_tokenizer()
    good = {"prompt": "one", "chosen": "two", "rejected": "six", "margin": 0.5}
    rows = [good, good | change]
    with pytest.raises(ValueError, match=f"row train/1: .*{reason}.*data.bad_rows: skip"):
        _pairs(tokenizer, *rows, margin_column="margin")
    data = _pairs(tokenizer, *rows, margin_column="margin", bad_rows="skip")
    assert data.counts == {"kept": 1, "filtered_long": 0, "truncated": 0, "bad_rows": 1}
    assert (data[0].id, data[0].margin) == ("train/0", 0.5)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [USER, WELL], "rejected": [USER, WELL, USER, BADLY]}, "part before their last message"),
        (
            {"chosen": [USER, WELL], "rejected": [USER | {"content": "x"}, BADLY]},
            "part before their last message",
        ),
        (
            {"prompt": "one", "chosen": [WELL], "rejected": "six"},
            "columns 'chosen' and 'rejected' hold text and messages",
        ),
        ({"chosen": [USER, WELL], "rejected": [USER]}, "the last message is the user's"),
        ({"chosen": [WELL], "rejected": [BADLY]}, "begins with the assistant's message"),
        (
            {"prompt": "five", "chosen": [USER, WELL], "rejected": [USER, BADLY]},
            "do not begin with the prompt 'five'",
        ),
        (
            {"prompt": "one", "chosen": [WELL, USER, WELL], "rejected": [BADLY]},
            "'chosen' is messages of assistant, user",
        ),
    ],
)
def test_conversations_that_are_no_pair_are_bad_rows(byte_tokenizer: Any, row: dict, reason: str) -> None:
    """Catches: answers to two different questions taken for a pair, and a prompt column that is silently passed over."""
    with pytest.raises(ValueError, match=f"row train/0: .*{reason}"):
        _pairs(byte_tokenizer(), row, **CHAT)


def test_the_longer_answer_decides_whether_a_pair_fits(byte_tokenizer: Any) -> None:
    """Catches: a pair of which only one answer was measured, and answers of one pair to differently cut prompts."""
    tokenizer = byte_tokenizer()
    rows = [
        {"prompt": "abc", "chosen": "x", "rejected": "xyz"},
        {"prompt": "abcd", "chosen": "xyz", "rejected": "x"},
    ]
    fits = _pairs(tokenizer, *rows, max_context=7)
    assert [p.id for p in fits] == ["train/0"]
    assert fits.counts == {"kept": 1, "filtered_long": 1, "truncated": 0, "bad_rows": 0}
    cut = _pairs(tokenizer, *rows, max_context=6, too_long="truncate")
    assert [_texts(tokenizer, p)[0] for p in cut] == ["bc", "cd"]
    with pytest.raises(
        ValueError, match="train/1: the prompt has 4 tokens, there is room for 3 beside an answer of 4"
    ):
        _pairs(tokenizer, *rows, max_context=7, too_long="error")


@pytest.mark.parametrize("labels", [(True, False), (1, 0), (1, -1), (1.0, -1.0)])
def test_labels_are_read(byte_tokenizer: Any, labels: tuple) -> None:
    """Catches -1 taken for true."""
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "one", "completion": "two", "label": label} for label in labels]
    data = _labels(tokenizer, *rows)
    assert [e.desirable for e in data] == [True, False]
    assert tokenizer.decode(data[0].prompt_ids + data[0].response_ids) == "onetwo<|eos|>"


@pytest.mark.parametrize("label", ["true", 2, 0.5, float("nan"), [1]])
def test_other_labels_are_bad_rows(byte_tokenizer: Any, label: Any) -> None:
    """Catches a text "false" that counts as true."""
    rows = [{"prompt": "one", "completion": "two", "label": value} for value in (True, False, label)]
    with pytest.raises(ValueError, match="row train/2: column 'label' is .*; a label is true or false"):
        _labels(byte_tokenizer(), *rows)
    assert _labels(byte_tokenizer(), *rows, bad_rows="skip").counts["bad_rows"] == 1


def test_labels_all_one_way_are_refused_with_counts(byte_tokenizer: Any) -> None:
    """Catches a training that has nothing to tell apart, and a scale on which 0 means no verdict."""
    row = {"prompt": "one", "completion": "two"}
    with pytest.raises(
        ValueError, match="data.label_column='label': 2 answers are desirable and 0 are not.*method: sft"
    ):
        _labels(byte_tokenizer(), row | {"label": 1}, row | {"label": True})
    with pytest.raises(ValueError, match="'label': 0 answers are desirable and 1 are not"):
        _labels(byte_tokenizer(), row | {"label": False})
    with pytest.raises(ValueError, match="holds both 0 and -1"):
        _labels(byte_tokenizer(), *(row | {"label": label} for label in (1, 0, -1)))
    with pytest.raises(ValueError, match="data.response_column is not set"):
        _labels(byte_tokenizer(), row | {"label": 1}, response_column=None)


def test_no_end_of_sequence_token_is_refused(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        _pairs(tokenizer, {"prompt": "one", "chosen": "two", "rejected": "six"})
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        _labels(tokenizer, {"prompt": "one", "completion": "two", "label": True})


def test_the_fingerprint_sees_margins_labels_and_which_is_better(byte_tokenizer: Any) -> None:
    """Catches a changed verdict that a resumed run would not notice."""
    tokenizer = byte_tokenizer()
    row = {"prompt": "one", "chosen": "two", "rejected": "six", "margin": 1}
    changed = [row, row | {"margin": 2}, row | {"chosen": "six", "rejected": "two"}]
    prints = [_pairs(tokenizer, r, margin_column="margin").fingerprint for r in changed]
    assert len(set(prints)) == 3
    rows = [
        {"prompt": "one", "completion": c, "label": label} for c, label in (("two", True), ("six", False))
    ]
    swapped = [r | {"label": not r["label"]} for r in rows]
    assert _labels(tokenizer, *rows).fingerprint != _labels(tokenizer, *swapped).fingerprint
