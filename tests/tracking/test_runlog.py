"""Record files: whole lines only, whatever a crash left behind."""

from __future__ import annotations

import pytest

from rlhf import runlog
from rlhf.runlog import RecordFile, encode_record, read_records, write_atomically

LINES = [encode_record({"step": step, "stage": "a", "x": step / 3}) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"".join(LINES)[:-1], 2),  # only the newline is missing: the next record would be glued on
        (LINES[0] + b'{"step": 2, "st\n' + LINES[2], 1),  # damaged in the middle: what follows is not trusted
        (LINES[0] + b"\x00\x00\x00\n" + LINES[2], 1),  # blocks that were never written before a power cut
        (LINES[0] + b"17\n" + LINES[2], 1),
        (LINES[0] + b"{}\n" + LINES[2], 1),
        (b"", 0),
    ],
)
def test_opening_keeps_the_whole_lines_before_the_first_damage(tmp_path, content, kept):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    file = RecordFile(path, keep_through=9)
    assert [r["step"] for r in file.kept] == [1, 2, 3][:kept]
    file.append([{"step": 9, "stage": "a", "x": 1.0}])
    file.close()
    assert [r["step"] for r in read_records(path)] == [*[1, 2, 3][:kept], 9]


def test_reading_ignores_a_line_that_is_being_written(tmp_path):
    # Catches: a report made while the run appends, which would fail on half a line.
    path = tmp_path / "records.jsonl"
    path.write_bytes(LINES[0] + LINES[1][:10])
    assert [r["step"] for r in read_records(path)] == [1]
    assert read_records(tmp_path / "absent.jsonl") == []


def test_a_failed_rewrite_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    # Catches: a report or run.json cut in half by a full disk.
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_durable_write_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    # Catches: "finished" after a power cut, with a file of zeros behind it.
    path, flushed = tmp_path / "finished.json", []
    monkeypatch.setattr(runlog, "flush_to_disk", lambda p: flushed.append((p.name, path.exists())))
    write_atomically(path, "yes", durable=True)
    assert [exists for _, exists in flushed] == [False, True] and flushed[1][0] == tmp_path.name
    assert path.read_text() == "yes" and [p.name for p in tmp_path.iterdir()] == ["finished.json"]
