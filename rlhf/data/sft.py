"""Texts to imitate: a prompt with its answer, or a whole conversation with the assistant's turns learned.

Not here: packing, in which no example reads another (`rlhf.batching`).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf.batching import SftExample
from rlhf.data.datasets import Row
from rlhf.data.rows import Dataset, Reader, Tokens, section
from rlhf.data.texts import Texts
from rlhf.recipe.schema import DatasetConfig


class SftDataset(Dataset[SftExample]):
    """Examples to imitate."""


def load_sft(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context: int | None = None,
    rows: Sequence[Row] | None = None,
) -> SftDataset:
    """The examples of a dataset.

    With config.response_column: the prompt as `load_prompts` makes it, then the answer (text, or one message of the
    assistant) and the end-of-sequence token. With config.messages_column: a conversation in the chat template, of
    which the assistant's turns are learned, each up to the special token that ends it, and all else is only read.
    Texts are tokenised apart where the writer changes, as the policy will meet them.

    `max_context` is the longest prompt + response in tokens; config.too_long applies ("truncate" cuts the
    prompt, and drops the row where the response alone is too long). Raises ValueError as `load_prompts` does,
    for a tokenizer without an end-of-sequence token, with which no policy could learn to stop, and for a chat
    template that changes earlier turns when later ones follow.
    """
    _check_source(config, section(name, "sft"))

    def read(row: Row) -> Texts:
        if config.messages_column is not None:
            return reader.columns.conversation(row, config.messages_column)
        return reader.columns.answered(row, [config.response_column])

    reader = Reader(config, tokenizer, name, rows, "sft")
    items = []
    for row in reader.tokens(read):
        response_ids, mask = _response(row, reader)
        if mask is not None and not any(mask):
            reader.leave_out(row.index, "it has no token to learn: the assistant's text has no tokens")
            continue
        ids, _ = reader.fit(row, max_context=max_context, beside=len(response_ids))
        if ids is not None:
            items.append(SftExample(row.id, ids, response_ids, mask))
    return SftDataset(*reader.finish(items))


def _check_source(config: DatasetConfig, key: str) -> None:
    if config.messages_column is None and config.response_column is None:
        raise ValueError(
            f"{key}.response_column is not set; sft needs the column with the answer to imitate "
            f"(or {key}.messages_column with whole conversations)"
        )
    if config.messages_column is not None and config.response_column is not None:
        raise ValueError(f"{key}.messages_column and {key}.response_column are both set; keep one")
    if config.messages_column is not None and not config.chat_template:
        raise ValueError(f"{key}.messages_column={config.messages_column!r} needs {key}.chat_template: true")


def _response(row: Tokens, reader: Reader) -> tuple[tuple[int, ...], tuple[bool, ...] | None]:
    """(response_ids, response_mask): of the pieces the first, the third and so on are learned."""
    pieces = [*row.pieces[:-1], reader.closed(row.pieces[-1])]
    ids = tuple(token for piece in pieces for token in piece)
    if len(pieces) == 1:
        return ids, None
    return ids, tuple(i % 2 == 0 for i, piece in enumerate(pieces) for _ in piece)
