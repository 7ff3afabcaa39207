"""A checkpoint is complete or it is not there; damage is said, never hidden."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rlhf.checkpoint import (
    MANIFEST,
    CheckpointError,
    check_space,
    find_checkpoint,
    load_tensors,
    remove_temporaries,
    save_checkpoint,
    save_tensors,
)

REPO = Path(__file__).resolve().parent.parent


def write_files(folder: Path) -> None:
    save_tensors(folder / "a.safetensors", {"w": torch.arange(6.0)})
    (folder / "sub").mkdir()
    (folder / "sub" / "b.json").write_text('{"n": 1}')


def save(root: Path, step: int, keep_last: int = 2, **options: object) -> Path:
    return save_checkpoint(
        root, step=step, write=write_files, meta={"step": step}, keep_last=keep_last, **options
    )


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def run_python(code: str, *args: object, faults: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(REPO), "RLHF_FAULTS": faults, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_what_was_saved_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    """Would catch: pruning the wrong end, losing meta or files in subfolders."""
    for step in (2, 4, 10):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000004", "step-00000010"]
    found = find_checkpoint(tmp_path)
    assert (found.step, found.meta, found.damaged) == (10, {"step": 10}, ())
    assert torch.equal(load_tensors(found.path / "a.safetensors")["w"], torch.arange(6.0))
    assert json.loads((found.path / "sub" / "b.json").read_text()) == {"n": 1}


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "never made") is None


def test_every_flipped_or_cut_byte_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Would catch: a manifest that is trusted unread, a file compared by size only, damage passed over in
    silence."""
    caplog.set_level(logging.CRITICAL)
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    for path in (newest / "a.safetensors", newest / "sub" / "b.json", newest / MANIFEST):
        content = path.read_bytes()
        places = [i for i in range(len(content)) if not content[i : i + 1].isspace()]
        for place in places[:: max(1, len(places) // 40)]:
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            found = find_checkpoint(tmp_path)
            assert (found.step, len(found.damaged)) == (1, 1), (
                f"{path.name}: flipped byte {place} went unseen"
            )
        path.write_bytes(content[:-1])
        assert find_checkpoint(tmp_path).step == 1, f"{path.name}: cut byte went unseen"
        path.unlink()
        assert find_checkpoint(tmp_path).step == 1, f"{path.name}: missing file went unseen"
        path.write_bytes(content)
        assert find_checkpoint(tmp_path).step == 2


def test_damage_is_said_aloud_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "a.safetensors").unlink()
    found = find_checkpoint(tmp_path)
    assert (
        found.damaged[0].path.name == "step-00000002"
        and "a.safetensors is missing" in found.damaged[0].reason
    )
    assert "step-00000002 is damaged" in caplog.text


def test_all_damaged_is_an_error_that_lists_why(tmp_path: Path) -> None:
    """Would catch: a fresh start over a run whose checkpoints cannot be read."""
    (save(tmp_path, 1) / MANIFEST).unlink()
    (save(tmp_path, 2) / "a.safetensors").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"(?s)step-00000002: a.safetensors has 1 bytes.*step-00000001: .*missing"
    ):
        find_checkpoint(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf import checkpoint

    (tmp_path / "secret").write_text("x")
    monkeypatch.setattr(checkpoint, "_files", lambda folder: [folder / ".." / "secret"])
    monkeypatch.setattr(Path, "relative_to", lambda self, other: Path("../secret"))
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="lies outside the checkpoint"):
        find_checkpoint(tmp_path)


def test_another_format_is_refused_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr("rlhf.checkpoint.FORMAT", 2)
    save(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has checkpoint format 2.*reads format 1"):
        find_checkpoint(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """Would catch: a resume from step 2 that cannot save over the damaged step 4 it passed over."""
    save(tmp_path, 2)
    (save(tmp_path, 4) / "a.safetensors").write_bytes(b"damaged")
    save(tmp_path, 4)
    found = find_checkpoint(tmp_path)
    assert (found.step, found.damaged) == (4, ()) and names(tmp_path) == ["step-00000002", "step-00000004"]


def test_a_damaged_newer_one_never_pushes_out_a_good_one(tmp_path: Path) -> None:
    """Would catch: keep_last=1 keeping step 9, which is damaged, and deleting step 5, which was just
    written."""
    (save(tmp_path, 9, keep_last=1) / MANIFEST).unlink()
    save(tmp_path, 5, keep_last=1)
    assert find_checkpoint(tmp_path).step == 5
    assert "step-00000009" in names(tmp_path), "it is left for whoever wants to look into it"


def test_a_renamed_checkpoint_is_not_taken_for_a_later_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-00000008")
    found = find_checkpoint(tmp_path)
    assert found.step == 1 and "named step 8 but was written as step 2" in found.damaged[0].reason


@pytest.mark.parametrize(
    "point",
    ["checkpoint.write", "checkpoint.before_rename", "checkpoint.after_rename", "checkpoint.delete_old"],
)
def test_killed_at_any_point_of_a_save_one_valid_is_left(tmp_path: Path, point: str) -> None:
    """Would catch: deleting the old before the new has its name, and a half-deleted one that looks
    damaged."""
    code = (
        "import sys; from pathlib import Path; from rlhf.checkpoint import save_checkpoint\n"
        "for n in (1, 2):\n"
        "    from rlhf.faults import at_step; at_step(n)\n"
        "    save_checkpoint(sys.argv[1], step=n, meta={}, keep_last=1,\n"
        "                    write=lambda d: (d / 'f').write_text(str(n)))"
    )
    result = run_python(code, tmp_path, faults=f"{point}@2=kill9")
    assert result.returncode == -signal.SIGKILL, result.stderr
    found = find_checkpoint(tmp_path)
    assert found.damaged == () and found.step == (
        1 if point in ("checkpoint.write", "checkpoint.before_rename") else 2
    )
    assert (found.path / "f").read_text() == str(found.step)
    save(tmp_path, 3, keep_last=1)
    assert names(tmp_path) == ["step-00000003"]


def test_killed_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    """Would catch: a moment at which the only checkpoint has no name that is looked for."""
    save(tmp_path, 1).rename(tmp_path / "step-00000001.old")
    assert find_checkpoint(tmp_path).step == 1
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("worker died"),
    ],
)
def test_a_failing_save_leaves_everything_as_it_was(tmp_path: Path, error: Exception) -> None:
    save(tmp_path, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"0" * 1000)
        raise error

    is_full = "No space" in str(error)
    with pytest.raises(CheckpointError if is_full else RuntimeError) as raised:
        save_checkpoint(tmp_path, step=2, write=fail, meta={}, keep_last=1)
    assert names(tmp_path) == ["step-00000001"] and find_checkpoint(tmp_path).step == 1
    if is_full:
        assert "GB" in str(raised.value) and "are free" in str(raised.value)


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: a check that runs after the disk is full. The estimate is the size of the last
    checkpoint."""
    with pytest.raises(CheckpointError, match=r"it needs \d{6,}\.\d+ GB and .* GB are free"):
        save(tmp_path, 1, needed_bytes=10**18)
    save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))
    with pytest.raises(CheckpointError, match=r"0\.000 GB are free"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_a_stage_that_does_not_fit_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: hours of training that end at the first save; a resumed run that counts its own checkpoints twice."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 0, 4 * 10**9))
    root = tmp_path / "stages" / "grpo" / "checkpoints"  # nothing of it exists yet
    size = dict(checkpoint_bytes=10**9, keep_last=2)
    check_space(root, **size, model_bytes=10**9)
    with pytest.raises(CheckpointError) as raised:
        check_space(root, **size, model_bytes=10**9 + 1)
    for part in (
        "4.000 GB free",
        "needs 4.000 GB",
        "3 checkpoints of 1.000 GB",
        "lower run.keep_last",
        "run.output_dir",
    ):
        assert part in str(raised.value)
    save(root, 1)
    check_space(root, **size, model_bytes=10**9 + 1)


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-save-1-00000003").mkdir()
    (tmp_path / ".tmp-save-1-00000003" / "f").write_text("half")
    assert find_checkpoint(tmp_path) is None
    remove_temporaries(tmp_path)
    assert names(tmp_path) == []


def test_keep_last_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last=0 would delete the checkpoint just written"):
        save(tmp_path, 1, keep_last=0)


def test_a_pickle_in_place_of_tensors_is_refused_unopened(tmp_path: Path) -> None:
    """Would catch: any fall-back to torch.load. The canary would be touched by unpickling."""
    import pickle

    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    path = tmp_path / "w.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_tensors(path)
    assert not canary.exists()


def test_tensors_keep_every_bit(tmp_path: Path) -> None:
    """Would catch: views saved whole, -0.0, NaN payloads or subnormals lost on the way."""
    odd = torch.tensor([0x80000000 - 2**32, 1, 0x7FC00001, 0x00800000], dtype=torch.int32).view(torch.float32)
    base = torch.arange(12.0).reshape(3, 4)
    save_tensors(tmp_path / "t", {"odd": odd, "column": base[:, 1], "step": torch.tensor(3.0)})
    back = load_tensors(tmp_path / "t")
    assert torch.equal(back["odd"].view(torch.int32), odd.view(torch.int32))
    assert torch.equal(back["column"], base[:, 1]) and back["step"].shape == ()
