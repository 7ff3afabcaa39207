"""Reading dataset rows: files, folders, the hub, and the built-in tasks.

Here: from a `DatasetConfig` to a list of rows, a row being a dict of columns. JSON and CSV are read here, row
by row, so that a damaged row is one bad row with a number and every value stays as written; Parquet, saved
folders and the hub go through the `datasets` library (imported only then), with its own cache and its offline
switches (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE). Not here: prompts and tokens (`rlhf.data.prompts`).
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.tasks import TASKS
from rlhf.recipe.schema import DatasetConfig

Row = Mapping[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read; `reason` is a sentence without the row's name."""

    reason: str


def load_rows(config: DatasetConfig) -> list[Row | BadRow]:
    """The rows of a dataset, at most `config.limit`, in the source's order.

    Raises ValueError for a source that is missing, unreadable or empty, naming what there is instead.
    """
    if config.task is not None:
        rows, source = _task_rows(config), f"task {config.task}"
    else:
        rows, source = _path_rows(config), config.path
    if not rows:
        raise ValueError(f"data: {source} holds no rows")
    return rows[: config.limit]


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _task_rows(config: DatasetConfig) -> list[Row]:
    if config.split is not None:
        raise ValueError(
            f"data.split={config.split!r} is for files and the hub; a task takes task_args.split"
        )
    if config.subset is not None:
        raise ValueError(f"data.subset={config.subset!r} is for the hub; task {config.task} has no subsets")
    return TASKS[config.task](**config.task_args)


def _path_rows(config: DatasetConfig) -> Sequence[Row | BadRow]:
    path = Path(config.path).expanduser()
    if config.task_args:
        raise ValueError(f"data.task_args={config.task_args} is for a built-in task, but data.path is set")
    if path.is_dir():
        return _read_folder(path, config)
    if path.is_file():
        return _read_file(path, config)
    if _looks_like_a_file(config.path):
        raise ValueError(f"data.path={config.path!r} does not exist{_neighbours(path)}")
    return _read_hub(config)


def _looks_like_a_file(path: str) -> bool:
    return Path(path).suffix in _READERS or path.startswith((".", "/", "~")) or path.count("/") > 1


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f", nor does its folder {str(folder)!r}"
    names = sorted(p.name for p in folder.iterdir())
    return did_you_mean(path.name, names) + f"; looked in {folder.resolve()}"


# -- files -----------------------------------------------------------------------------------------


def _read_file(path: Path, config: DatasetConfig) -> list[Row | BadRow]:
    if path.suffix not in _READERS:
        raise ValueError(f"data.path={config.path!r} ends in {path.suffix!r}; can read {', '.join(_READERS)}")
    if config.subset is not None or config.split not in (None, "train"):
        asked = f"subset={config.subset!r}, split={config.split!r}"
        raise ValueError(
            f"data.path={config.path!r} is one file without parts, but {asked} is set; remove it"
        )
    return _READERS[path.suffix](path)


def _read_json(path: Path) -> list[Row | BadRow]:
    """JSON lines, or one array of objects. A byte order mark is skipped."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.lstrip().startswith(b"["):
        lines = enumerate(data.split(b"\n"), start=1)
        return [_read_line(line, number) for number, line in lines if line.strip()]
    try:
        values = json.loads(data.decode("utf-8"))
    except ValueError as error:  # broken UTF-8 and broken JSON alike
        raise ValueError(f"data.path={str(path)!r} is not valid JSON: {error}") from None
    return [_as_row(value, f"entry {i}") for i, value in enumerate(values)]


def _read_line(line: bytes, number: int) -> Row | BadRow:
    try:
        return _as_row(json.loads(line.decode("utf-8")), f"line {number}")
    except UnicodeDecodeError as error:
        return BadRow(f"line {number} is not valid UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"line {number} is not valid JSON: {error}")


def _as_row(value: Any, where: str) -> Row | BadRow:
    return value if isinstance(value, dict) else BadRow(f"{where} is a {type(value).__name__}, not an object")


def _read_csv(path: Path) -> list[Row | BadRow]:
    """Text stays text: "007" is not 7, and "NA" is not a missing value. A missing cell is None."""
    csv.field_size_limit(2**31 - 1)  # the module's default refuses texts above 128 kB
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return [
                BadRow(f"line {reader.line_num} has more cells than the header") if None in row else row
                for row in reader
            ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"data.path={str(path)!r} is not readable as csv: {_root(error)}") from None


def _read_parquet(path: Path) -> list[Row]:
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train").to_list()
    except Exception as error:  # the library raises many types for a damaged file
        raise ValueError(f"data.path={str(path)!r} is not readable as parquet: {_root(error)}") from error


_READERS: dict[str, Callable[[Path], list[Row | BadRow]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


# -- folders and the hub ---------------------------------------------------------------------------


def _read_folder(path: Path, config: DatasetConfig) -> list[Row]:
    import datasets

    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise ValueError(
            f"data.path={config.path!r} is a folder, but not one written by datasets.save_to_disk; "
            f"name a file in it ({', '.join(_READERS)})"
        )
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        raise ValueError(f"data.path={config.path!r} is not readable: {_root(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        split = config.split or "train"
        if split not in loaded:
            raise ValueError(
                f"data.split={split!r} is not in {config.path!r}; it has {', '.join(sorted(loaded))}"
            )
        return loaded[split].to_list()
    if config.split not in (None, "train"):
        raise ValueError(
            f"data.split={config.split!r}: {config.path!r} holds one set without splits; remove it"
        )
    return loaded.to_list()


def _read_hub(config: DatasetConfig) -> list[Row]:
    import datasets

    split = config.split or "train"
    try:
        loaded = datasets.load_dataset(config.path, config.subset, split=split)
    except (
        Exception
    ) as error:  # not found, gated, offline, no network, no such subset or split: told apart by the text
        raise ValueError(
            f"data.path={config.path!r} is no file here and does not load from the hub "
            f"(subset={config.subset!r}, split={split!r}): {_root(error)}"
        ) from error
    return loaded.to_list()


def _root(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 400 else text[:400] + "..."
