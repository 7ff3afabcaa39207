"""Judged answers: pairs of which one is better, and single ones that are wanted or not.

Not here: answers judged step by step (`rlhf.data.steps`), and the losses on them (`rlhf.preference`, `rlhf.kto`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf.batching import LabelExample, PreferenceExample
from rlhf.data.chat import Refused
from rlhf.data.datasets import Row
from rlhf.data.rows import Dataset, Reader, section
from rlhf.data.texts import Texts, cell
from rlhf.recipe.schema import DatasetConfig


class PreferenceDataset(Dataset[PreferenceExample]):
    """Pairs of a better and a worse answer."""


class LabelDataset(Dataset[LabelExample]):
    """Answers that are wanted or not."""


def load_preferences(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context: int | None = None,
    rows: Sequence[Row] | None = None,
) -> PreferenceDataset:
    """The pairs of a dataset: the prompt as `load_prompts` makes it, and the answers in config.chosen_column and
    config.rejected_column, each with its end as in `load_sft`.

    The answers are texts, or one message of the assistant each, or whole conversations that differ in their last
    answer only (what they share is the prompt). Where the rows have no column "prompt" and the recipe names no other,
    two texts are cut after the words that they share. `max_context` is the longest prompt + answer in tokens, of
    the longer one; config.too_long applies to the pair. A pair of equal answers is a bad row. Raises ValueError as
    `load_sft` does.
    """
    columns = (config.chosen_column, config.rejected_column)

    def read(row: Row) -> Texts:
        if cell(row, columns[0]) == cell(row, columns[1]):
            raise Refused(f"columns {columns[0]!r} and {columns[1]!r} are equal, so neither answer is better")
        return dataclasses.replace(
            reader.columns.answered(row, columns), note=_margin(row, config.margin_column)
        )

    reader = Reader(config, tokenizer, name, rows, "preferences")
    items = []
    for row in reader.tokens(read):
        chosen, rejected = map(reader.closed, row.pieces)
        if chosen == rejected:
            reader.leave_out(row.index, "the two answers differ, but the tokens of both are the same")
            continue
        ids, _ = reader.fit(row, max_context=max_context, beside=max(len(chosen), len(rejected)))
        if ids is not None:
            items.append(PreferenceExample(row.id, ids, chosen, rejected, row.note))
    return PreferenceDataset(*reader.finish(items))


def load_labels(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context: int | None = None,
    rows: Sequence[Row] | None = None,
) -> LabelDataset:
    """The judged answers of a dataset: prompt and answer as `load_sft` makes them of config.response_column, and the
    verdict in config.label_column: true or false, 1 or 0, 1 or -1.

    Raises ValueError as `load_sft` does, for a column that holds both 0 and -1, and for labels that are all one
    way: there is nothing to tell apart.
    """
    key, column = section(name, "labels"), config.label_column
    if config.response_column is None:
        raise ValueError(
            f"{key}.response_column is not set; labels need the column with the answer they judge"
        )

    def read(row: Row) -> Texts:
        return dataclasses.replace(
            reader.columns.answered(row, [config.response_column]), note=_label(row, column)
        )

    reader = Reader(config, tokenizer, name, rows, "labels")
    items, labels = [], set()
    for row in reader.tokens(read):
        labels.add(row.note)
        response_ids = reader.closed(row.pieces[0])
        ids, _ = reader.fit(row, max_context=max_context, beside=len(response_ids))
        if ids is not None:
            items.append(LabelExample(row.id, ids, response_ids, row.note > 0))
    if {0, -1} <= labels:
        raise ValueError(
            f"{key}.label_column={column!r} holds both 0 and -1; write one of them for an answer that is not wanted, "
            "and leave out rows without a verdict"
        )
    finished = reader.finish(items)
    desirable = sum(item.desirable for item in items)
    if desirable in (0, len(items)):
        raise ValueError(
            f"{key}.label_column={column!r}: {desirable} answers are desirable and {len(items) - desirable} are not, "
            "so there is nothing to tell apart; add answers of the other kind, or train on good ones alone with "
            "method: sft"
        )
    return LabelDataset(*finished)


def _margin(row: Row, column: str | None) -> float | None:
    if column is None:
        return None
    value = cell(row, column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Refused(f"column {column!r} is {value!r:.80}; a margin is a finite number")
    return float(value)


def _label(row: Row, column: str) -> int:
    value = cell(row, column)
    if not isinstance(value, (bool, int, float)) or value not in (-1, 0, 1):
        raise Refused(f"column {column!r} is {value!r:.80}; a label is true or false, 1 or 0, 1 or -1")
    return int(value)
