"""The record files of a run directory: JSON lines in order of step, appended, flushed, and cut back on
resume.

Here: how a record becomes a line and back, `RecordFile`, the atomic write of a whole file, and forcing one onto the
disk. Not here: what
is recorded (`rlhf.tracking`) and how it is shown (`rlhf.report`, `rlhf.console`).

A run directory holds metrics.jsonl (values that are a function of the recipe), timings.jsonl (values that are
measured), samples.jsonl, run.json (name, recipe, stages, status) and report.html.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
SAMPLES_FILE = "samples.jsonl"
RUN_FILE = "run.json"
REPORT_FILE = "report.html"

_NON_FINITE = ("NaN", "Infinity", "-Infinity")


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One line. JSON has no NaN: non-finite numbers become the strings "NaN", "Infinity", "-Infinity"."""
    text = json.dumps(_json_safe(record), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes its JSON escape


def decode_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl or timings.jsonl with its non-finite numbers as floats again."""
    return {k: float(v) if k != "stage" and v in _NON_FINITE else v for k, v in record.items()}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a record file, in order; [] if there is no file. Reading ends at a torn or damaged
    line."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [record for record, _ in _whole_lines(file)]


def write_atomically(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file by `text`: readers see the old or the new content, never a part. With `durable` the new one is on
    the disk, and survives a power cut, when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            flush_to_disk(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a directory's entries, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RecordFile:
    """An append-only record file. Opening it cuts it to the records with step <= `keep_through` (None: to
    nothing); everything from the first later, torn or damaged line on goes.

    `kept` holds the records that stayed. An append is in memory until `flush`, which hands it to the
    operating system: a killed process loses nothing that was flushed. `sync` also survives a power cut.
    """

    def __init__(self, path: Path, *, keep_through: int | None) -> None:
        self.path = path
        self.kept: list[dict[str, Any]] = []
        self._file = path.open("a+b")
        self._file.seek(0)
        length = 0
        if keep_through is not None:
            for record, end in _whole_lines(self._file):
                if record.get("step", math.inf) > keep_through:
                    break
                self.kept.append(record)
                length = end
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._file.write(b"".join(encode_record(r) for r in records))

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _whole_lines(file: Iterable[bytes]) -> Iterable[tuple[dict[str, Any], int]]:
    """(record, offset of its end) up to the first line that is torn or is no JSON object."""
    end = 0
    for line in file:
        end += len(line)
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict):
            return
        yield record, end


def _json_safe(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(k): _json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    return value
