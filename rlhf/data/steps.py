"""Answers judged step by step, for process reward models.

Not here: answers judged as a whole (`rlhf.data.preferences`), and the loss (`rlhf.reward_loss`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.batching import StepExample
from rlhf.data.chat import Refused
from rlhf.data.datasets import Row
from rlhf.data.rows import Dataset, Reader
from rlhf.data.texts import Texts, cell
from rlhf.recipe.schema import DatasetConfig


class StepDataset(Dataset[StepExample]):
    """Answers in steps, each with a label."""


def load_steps(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context: int | None = None,
    rows: Sequence[Row] | None = None,
) -> StepDataset:
    """The judged steps of a dataset: the prompt as `load_prompts` makes it, the steps (a list of texts) of
    config.steps_column, and their labels (true or false, or from 0 to 1) of config.step_labels_column.

    Each step is followed by config.step_separator and tokenised apart; its label stands at the last token, separator
    included. No stop token follows. Lengths go as in `load_sft`. Raises ValueError as `load_prompts` does, and where
    all steps have the same label.
    """

    def read(row: Row) -> Texts:
        steps, labels = _list(row, config.steps_column), _list(row, config.step_labels_column)
        if len(labels) != len(steps):
            raise Refused(
                f"column {config.step_labels_column!r} has {len(labels)} labels for {len(steps)} steps"
            )
        pieces = tuple(_text(step, i, reader) + config.step_separator for i, step in enumerate(steps))
        reader.columns.check("".join(pieces), "a step with its separator")
        return Texts(
            reader.columns.prompt(row), pieces, note=tuple(_label(label, i) for i, label in enumerate(labels))
        )

    reader = Reader(config, tokenizer, name, rows, "steps")
    items = []
    for row in reader.tokens(read):
        if not all(row.pieces):
            reader.leave_out(row.index, "a step has no tokens, so its label has no place")
            continue
        response_ids = tuple(token for piece in row.pieces for token in piece)
        ends = tuple(end - 1 for end in accumulate(map(len, row.pieces)))
        ids, _ = reader.fit(row, max_context=max_context, beside=len(response_ids))
        if ids is not None:
            items.append(StepExample(row.id, ids, response_ids, ends, row.note))
    finished = reader.finish(items)
    values = {label for item in items for label in item.step_labels}
    if len(values) == 1:
        raise ValueError(
            f"{reader.key}.step_labels_column={config.step_labels_column!r}: the label of every step is "
            f"{values.pop():g}, so there is nothing to tell apart; add steps with another"
        )
    return StepDataset(*finished)


def _text(step: Any, index: int, reader: Reader) -> str:
    if not isinstance(step, str):
        raise Refused(f"step {index} is a {type(step).__name__}, not text")
    reader.columns.check(step, f"step {index}")
    return step


def _label(label: Any, index: int) -> float:
    if not isinstance(label, (bool, int, float)) or not 0 <= label <= 1:  # NaN too
        raise Refused(f"the label of step {index} is {label!r:.80}; a label is true or false, or from 0 to 1")
    return float(label)


def _list(row: Row, column: str) -> Sequence[Any]:
    value = cell(row, column)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise Refused(f"column {column!r} is {value!r:.80}, not a list with a value for each step")
    return value
