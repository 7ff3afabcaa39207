"""Reading dataset rows: files, folders, the hub, and the built-in tasks.

Here: from a `DatasetConfig` to a list of rows, a row being a dict of columns; and the same look at the source and its
first rows that a recipe's check takes (`source_faults`, `read_head`, `column_faults`). JSON and CSV are read here, row
by row, so that a damaged row is one bad row with a number and every value stays as written; Parquet, saved
folders and the hub go through the `datasets` library (imported only then), with its own cache and its offline
switches (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE). Not here: prompts and tokens (`rlhf.data.prompts`).
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.recipe.problems import Fault
from rlhf.recipe.schema import DatasetConfig
from rlhf.recipe.suggest import closest

Row = Mapping[str, Any]

# What rows are to become, and the fields whose columns that needs beside the prompt's.
Kind = Literal["prompts", "sft", "preferences", "labels", "steps"]
_COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "prompts": (),
    "sft": ("messages_column", "response_column"),
    "preferences": ("chosen_column", "rejected_column", "margin_column"),
    "labels": ("response_column", "label_column"),
    "steps": ("steps_column", "step_labels_column"),
}
_PROMPT_COLUMN = DatasetConfig.model_fields["prompt_column"].default

HEAD_ROWS = 20  # rows that a recipe's check looks at
_HEAD_BYTES = 4_000_000  # of a file, for them

# Endings that no hub name has, so that a missing file is not looked for on the hub.
_OTHER_FILES = (
    ".txt",
    ".tsv",
    ".gz",
    ".zst",
    ".zip",
    ".arrow",
    ".feather",
    ".ndjson",
    ".yaml",
    ".yml",
    ".xlsx",
)


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read; `reason` is a sentence without the row's name."""

    reason: str


@dataclass(frozen=True)
class Head:
    """What can be seen of a source without reading it all."""

    rows: tuple[Row | BadRow, ...]  # the first rows; () where only the columns are known
    columns: frozenset[str]
    count: int | None  # rows in the source, where that is known


def load_rows(config: DatasetConfig, key: str = "data") -> list[Row | BadRow]:
    """The rows of a dataset, at most `config.limit`, in the source's order. `key` is the section's, for messages.

    Raises ValueError for a source that is missing, unreadable or empty, naming what there is instead.
    """
    for fault in source_faults(config):
        raise ValueError(str(fault.below((key,))))
    if config.task is not None:
        rows, source = _tasks()[config.task](**config.task_args), f"task {config.task}"
    else:
        rows, source = _path_rows(config, key), config.path
    if not rows:
        raise ValueError(f"{key}: {source} holds no rows; give a dataset with some")
    return rows[: config.limit]


def source_faults(config: DatasetConfig) -> Iterator[Fault]:
    """What is wrong with where the rows come from, seen without reading them; keys count from the section."""
    if config.task is not None:
        if config.split is not None:
            yield Fault(
                (("split",), ("task",)),
                f"{config.split!r} is for files and the hub",
                "a task takes task_args.split",
            )
        if config.subset is not None:
            message = f"{config.subset!r} is for the hub; task {config.task} has no subsets"
            yield Fault((("subset",), ("task",)), message, "remove it")
        from rlhf.data.tasks import argument_faults

        yield from (fault.below(("task_args",)) for fault in argument_faults(config.task, config.task_args))
        return
    if config.task_args:
        message = f"{config.task_args} is for a built-in task, but path is set"
        yield Fault((("task_args",), ("path",)), message, "remove it, or set task in the place of path")
    path = Path(config.path).expanduser()
    if path.is_dir():
        yield from _folder_faults(path, config)
    elif path.is_file():
        yield from _file_faults(path, config)
    elif _looks_like_a_file(config.path):
        yield Fault((("path",),), f"{config.path!r} does not exist", _neighbours(path))


def read_head(config: DatasetConfig) -> Head | None:
    """The first rows of a source without faults; None for the hub, and where no row fits into the head.

    Raises ValueError for a file that cannot be read at all, and for a task that has fewer rows than it is asked for.
    """
    if config.task is not None:
        from rlhf.data.tasks import first_rows

        return head_of(first_rows(config.task, config.task_args, HEAD_ROWS), config.task_args["count"])
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _folder_head(path, config)
    return _HEADS[path.suffix](path) if path.is_file() else None


def has_implicit_prompt(config: DatasetConfig, kind: Kind, columns: Collection[str]) -> bool:
    """Whether the answers of a pair begin with their prompt: the recipe names none, and the rows have none apart."""
    names_none = config.prompt_template is None and config.prompt_column == _PROMPT_COLUMN
    return kind == "preferences" and names_none and _PROMPT_COLUMN not in columns


def column_faults(config: DatasetConfig, kind: Kind, columns: Collection[str]) -> Iterator[Fault]:
    """The columns that the section names, that the kind needs, and that are not among `columns`; keys count from the
    section. A prompt_template takes the place of prompt_column; a field that is None names no column."""
    whole = has_implicit_prompt(config, kind, columns) or (
        kind == "sft" and config.messages_column is not None
    )
    wanted: dict[str, str] = {}
    for field in (*(() if whole else ("prompt_column",)), *_COLUMNS[kind]):
        if field == "prompt_column" and config.prompt_template is not None:
            try:
                wanted.update(dict.fromkeys(template_fields(config.prompt_template), "prompt_template"))
            except ValueError as error:
                yield Fault((("prompt_template",),), str(error))
        elif (column := getattr(config, field)) is not None:
            wanted[column] = field
    for column, field in wanted.items():
        if columns and column not in columns:
            near = closest(column, list(columns))
            has = f"it has {', '.join(sorted(columns))}"
            hint = f"did you mean {near!r}? {has}" if near is not None else has
            keys = (
                (field,),
                ("path",),
                ("task",),
                *((("prompt_template",),) if field == "prompt_column" else ()),
            )
            yield Fault(keys, f"the dataset has no column {column!r}", hint)


def template_fields(template: str) -> tuple[str, ...]:
    """Columns named in a template. Raises ValueError for anything but plain {column}."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; write a plain brace twice") from None
    fields = []
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if not field or spec or conversion or "." in field or "[" in field:
            raise ValueError(f"{template!r} may hold plain {{column}} fields only, found {{{field}}}")
        fields.append(field)
    return tuple(fields)


def _tasks() -> Mapping[str, Callable[..., list[dict[str, str]]]]:
    from rlhf.data.tasks import TASKS  # a file's recipe is checked without them

    return TASKS


def _path_rows(config: DatasetConfig, key: str) -> Sequence[Row | BadRow]:
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _read_folder(path, config)
    return _READERS[path.suffix](path) if path.is_file() else _read_hub(config, key)


def _looks_like_a_file(path: str) -> bool:
    suffix = Path(path).suffix
    misspelt = len(suffix) > 3 and bool(difflib.get_close_matches(suffix, list(_READERS), n=1, cutoff=0.75))
    return (
        suffix in (*_READERS, *_OTHER_FILES)
        or misspelt
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
    )


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"nor does its folder {str(folder)!r}; paths count from the working directory, {Path.cwd()}"
    near = closest(path.name, sorted(p.name for p in folder.iterdir()))
    looked = f"looked in {folder.resolve()}"
    return f"did you mean {str(folder / near)!r}? {looked}" if near is not None else looked


# -- files -----------------------------------------------------------------------------------------


def _file_faults(path: Path, config: DatasetConfig) -> Iterator[Fault]:
    if path.suffix not in _READERS:
        message = (
            f"{config.path!r} ends in {path.suffix!r}" if path.suffix else f"{config.path!r} has no ending"
        )
        yield Fault((("path",),), message, f"can read {', '.join(_READERS)}")
    for name, value in (("subset", config.subset), ("split", config.split)):
        if value is not None and (name, value) != ("split", "train"):
            message = f"{value!r} is set, but {config.path!r} is one file without parts"
            yield Fault(((name,), ("path",)), message, "remove it")


def head_of(rows: Iterable[Row | BadRow], count: int | None) -> Head:
    """The head of a source of `count` rows (None: not known) that begins with `rows`."""
    rows = tuple(rows)
    return Head(rows, frozenset(c for row in rows if isinstance(row, Mapping) for c in row), count)


def _json_head(path: Path) -> Head | None:
    with path.open("rb") as file:
        data = file.read(_HEAD_BYTES)
    whole = len(data) < _HEAD_BYTES
    if whole or not data.removeprefix(_BOM).lstrip().startswith(b"["):
        rows = _json_rows(path, data if whole else data[: data.rfind(b"\n") + 1])
        first = tuple(itertools.islice(rows, HEAD_ROWS))
        return (
            head_of(first, len(first) + sum(1 for _ in rows) if whole else None) if whole or first else None
        )
    text = data.decode("utf-8", errors="ignore")
    try:
        value, _ = json.JSONDecoder().raw_decode(text[text.index("[") + 1 :].lstrip())
    except (ValueError, RecursionError):
        return None
    return head_of([_as_row(value, "entry 0")], None)


def _csv_head(path: Path) -> Head:
    rows = _csv_rows(path)
    first = list(itertools.islice(rows, HEAD_ROWS))
    return head_of(first, len(first) if len(first) < HEAD_ROWS else None)


def _parquet_head(path: Path) -> Head:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return Head((), frozenset(file.schema_arrow.names), file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is not readable as parquet: {_root(error)}") from error


def _read_json(path: Path) -> list[Row | BadRow]:
    return list(_json_rows(path, path.read_bytes()))


_BOM = b"\xef\xbb\xbf"


def _json_rows(path: Path, data: bytes) -> Iterator[Row | BadRow]:
    """JSON lines, or one array of objects. A byte order mark is skipped."""
    data = data.removeprefix(_BOM)
    if not data.lstrip().startswith(b"["):
        lines = enumerate(data.split(b"\n"), start=1)
        yield from (_read_line(line, number) for number, line in lines if line.strip())
        return
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # broken UTF-8 and broken JSON alike
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from None
    yield from (_as_row(value, f"entry {i}") for i, value in enumerate(values))


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
    return list(_csv_rows(path))


def _csv_rows(path: Path) -> Iterator[Row | BadRow]:
    """Text stays text: "007" is not 7, and "NA" is not a missing value. A missing cell is None."""
    csv.field_size_limit(2**31 - 1)  # the module's default refuses texts above 128 kB
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for row in reader:
                too_long = BadRow(f"line {reader.line_num} has more cells than the header")
                yield too_long if None in row else row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not readable as csv: {_root(error)}") from None


def _read_parquet(path: Path) -> list[Row]:
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train").to_list()
    except Exception as error:  # the library raises many types for a damaged file
        raise ValueError(f"{str(path)!r} is not readable as parquet: {_root(error)}") from error


_READERS: dict[str, Callable[[Path], list[Row | BadRow]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
_HEADS: dict[str, Callable[[Path], Head | None]] = {
    ".jsonl": _json_head,
    ".json": _json_head,
    ".parquet": _parquet_head,
    ".csv": _csv_head,
}


# -- folders and the hub ---------------------------------------------------------------------------


def _folder_faults(path: Path, config: DatasetConfig) -> Iterator[Fault]:
    splits = _splits(path)
    if splits is not None:
        split = config.split or "train"
        if split not in splits:
            message = f"{split!r} is not in {config.path!r}"
            yield Fault((("split",), ("path",)), message, f"it has {', '.join(sorted(splits))}")
    elif not (path / "state.json").is_file():
        files = sorted(p.name for p in path.iterdir() if p.suffix in _READERS)
        hint = f"did you mean {str(path / files[0])!r}?" if files else f"name a file ({', '.join(_READERS)})"
        message = f"{config.path!r} is a folder, but not one written by datasets.save_to_disk"
        yield Fault((("path",),), message, hint)
    elif config.split not in (None, "train"):
        message = f"{config.split!r} is set, but {config.path!r} holds one set without splits"
        yield Fault((("split",), ("path",)), message, "remove it")


def _splits(path: Path) -> list[str] | None:
    """The splits of a folder written by datasets.save_to_disk; None where it has none."""
    file = path / "dataset_dict.json"
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["splits"]) if file.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None


def _folder_head(path: Path, config: DatasetConfig) -> Head | None:
    """The columns that datasets wrote down beside the rows."""
    folder = path if _splits(path) is None else path / (config.split or "train")
    try:
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
        return Head((), frozenset(info["features"]), None)
    except (OSError, ValueError, KeyError, TypeError):  # an older or damaged folder: loading it will tell
        return None


def _read_folder(path: Path, config: DatasetConfig) -> list[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many types for a damaged folder
        raise ValueError(f"{config.path!r} is not readable: {_root(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[config.split or "train"]
    return loaded.to_list()


def _read_hub(config: DatasetConfig, key: str) -> list[Row]:
    import datasets

    split = config.split or "train"
    try:
        loaded = datasets.load_dataset(config.path, config.subset, split=split)
    except (
        Exception
    ) as error:  # not found, gated, offline, no network, no such subset or split: told apart by the text
        raise ValueError(
            f"{key}.path={config.path!r} is no file here and does not load from the hub "
            f"(subset={config.subset!r}, split={split!r}): {_root(error).rstrip('.')}; give the path of a file (paths "
            f"count from {Path.cwd()}), or check name, subset, split, the network, and HF_TOKEN for a gated set"
        ) from error
    return loaded.to_list()


def _root(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 400 else text[:400] + "..."
