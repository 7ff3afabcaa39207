"""Prompts in and answers out, a JSON object a line. Not here: sampling (`rlhf.serving.batch`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.runlog import write_atomically
from rlhf.serving.settings import NotStarted


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Raises NotStarted, naming the line, for what is no object with `prompt` or `messages`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NotStarted(f"--file {path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise NotStarted(f"{path}, line {number} is no JSON: {error}") from None
        is_text = isinstance(row, dict) and isinstance(row.get("prompt"), str)
        is_chat = isinstance(row, dict) and isinstance(row.get("messages"), list)
        if is_text == is_chat:
            raise NotStarted(
                f"{path}, line {number}: want an object with either `prompt`, a text, or `messages`, a list"
            )
        rows.append(row)
    if not rows:
        raise NotStarted(f"{path} holds no prompt")
    return rows


def write_rows(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    """To a file, whole or not at all, or to the terminal."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path is None:
        sys.stdout.write(text)
        return
    write_atomically(path, text)
