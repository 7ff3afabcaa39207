"""Prompts to sample from, made of dataset rows.

All rows are read, checked and tokenised before step 1. Not here: what every loader does with its rows
(`rlhf.data.rows`), where rows come from (`rlhf.data.datasets`) and the order in which they are visited
(`rlhf.data.cursor`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.datasets import Row
from rlhf.data.rows import Dataset, Reader
from rlhf.data.texts import Texts
from rlhf.recipe.schema import DatasetConfig
from rlhf.records import Prompt


class PromptDataset(Dataset[Prompt]):
    """Prompts to sample from."""


def load_prompts(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context: int | None,
    rows: Sequence[Row] | None = None,
) -> PromptDataset:
    """The prompts of a dataset; a prompt's id is "<name>/<number of its row in the source>".

    `max_context` is the longest prompt in tokens that leaves room for a response; longer ones, and those
    beyond config.max_prompt_tokens, go by config.too_long. `rows` takes the place of the source that `config`
    names. Raises ValueError for a source or a column that is missing, for a row that cannot be used
    (config.bad_rows=error), and when nothing is left.
    """
    reader = Reader(config, tokenizer, name, rows, "prompts")
    items = []
    for row in reader.tokens(lambda columns: Texts(reader.columns.prompt(columns))):
        ids, text = reader.fit(row, max_context=max_context)
        if ids is not None:
            items.append(Prompt(id=row.id, token_ids=ids, text=text, row=row.columns))
    return PromptDataset(*reader.finish(items, _describe))


def _describe(prompt: Prompt) -> list[Any]:
    return [prompt.id, prompt.token_ids, dict(prompt.row)]
