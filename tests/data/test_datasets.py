"""Where rows come from: every format reads back what was written, and a wrong source is named with what there
is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.datasets import load_rows
from rlhf.recipe.schema import DatasetConfig

ROWS = [
    {"prompt": "1+1=", "answer": "2"},
    {"prompt": "1+6=", "answer": "007"},
    {"prompt": "\u00e9\n", "answer": "NA"},
]


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def _load(path: Path | str, **config: Any) -> list:
    return load_rows(DatasetConfig(path=str(path), **config))


def _folder(path: Path, splits: tuple[str, ...] | None = None) -> Path:
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    parts = datasets.DatasetDict({s: table.select(range(i, 3)) for i, s in enumerate(splits or ())})
    (parts if splits else table).save_to_disk(str(path))
    return path


def test_every_format_reads_back_what_was_written(tmp_path: Path) -> None:
    """Catches type guessing: "007" must not become 7, nor "NA" a missing value."""
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "lines.json").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.to_csv(str(tmp_path / "a.csv"))
    for name in ("a.jsonl", "lines.json", "a.json", "a.parquet", "a.csv"):
        assert _load(tmp_path / name) == ROWS, name
    assert _load(_folder(tmp_path / "saved")) == ROWS
    assert _load(_folder(tmp_path / "splits", ("train", "test")), split="test") == ROWS[1:]
    assert _load(tmp_path / "a.jsonl", limit=2) == ROWS[:2]


def test_values_of_mixed_type_stay_as_written(tmp_path: Path) -> None:
    """Catches a reader that refuses or converts a column which holds numbers and text, or dates."""
    rows = [
        {"answer": 1, "day": "2024-01-01"},
        {"answer": "one", "day": "2024-01-01"},
        {"answer": [1], "more": None},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert _load(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize(
    ("path", "config", "message"),
    [
        ("row.jsonl", {}, r"does not exist; did you mean '.*/rows.jsonl'\? looked in"),
        ("nowhere/rows.jsonl", {}, "does not exist; nor does its folder"),
        ("rows.txt", {}, "ends in '.txt'; can read .jsonl, .json, .parquet, .csv"),
        ("empty.jsonl", {}, "empty.jsonl holds no rows"),
        ("broken.json", {}, "broken.json' is not valid JSON: "),
        ("broken.parquet", {}, "broken.parquet' is not readable as parquet: "),
        ("plain", {}, "is a folder, but not one written by datasets.save_to_disk"),
        (
            "rows.jsonl",
            {"split": "test"},
            "data.split: 'test' is set, but .* is one file without parts; remove it",
        ),
        ("rows.jsonl", {"task_args": {"count": 1}}, "data.task_args: {'count': 1} is for a built-in task"),
        ("saved", {"split": "test"}, "holds one set without splits"),
        ("splits", {"split": "tset"}, r"data.split: 'tset' is not in .*; it has test, train"),
    ],
)
def test_a_wrong_source_is_named(tmp_path: Path, path: str, config: dict, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.json").write_text('[{"prompt": ')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "plain").mkdir()
    if path in ("saved", "splits"):
        _folder(tmp_path / path, None if path == "saved" else ("train", "test"))
    with pytest.raises(ValueError, match=message):
        _load(tmp_path / path, **config)


def test_the_hub_offline_is_one_clear_error() -> None:
    """Catches a search of the network while it is switched off, and an error that does not name the
    dataset."""
    with pytest.raises(
        ValueError, match="data.path='someone/nothing' is no file here and does not load from the hub"
    ):
        _load("someone/nothing")


def test_split_beside_a_task_is_refused() -> None:
    """Catches a held-out set that is silently the training set."""
    with pytest.raises(ValueError, match="a task takes task_args.split"):
        load_rows(DatasetConfig(task="chain_arithmetic", task_args={"count": 2}, split="eval"))
