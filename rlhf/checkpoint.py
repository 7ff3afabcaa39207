"""Checkpoints that survive being interrupted.

A checkpoint is a directory `step-00000040` with its files and `manifest.json`. It is written under a
temporary name and flushed; the manifest (size and SHA-256 of every file) comes last, then the rename, and
only then are older ones deleted. There is no pointer file: the newest checkpoint whose manifest agrees with
its files is the latest one. Tensors are safetensors and everything else JSON, so that reading a checkpoint
executes nothing.

Here: when files become a checkpoint. Not here: what is in the files (`rlhf.trainers`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf.faults import fault_point
from rlhf.runlog import flush_to_disk

FORMAT = 1
MANIFEST = "manifest.json"

_NAME = re.compile(r"step-(\d{8,})(\.old)?")
_TEMPORARY = ".tmp-"
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read."""


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that was passed over, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte agreed with its manifest when it was found."""

    path: Path
    step: int
    meta: Mapping[str, Any]  # what `save_checkpoint` was given
    damaged: tuple[Damaged, ...] = ()  # newer ones that were passed over


# -- saving --------------------------------------------------------------------------------------------------


def save_checkpoint(
    root: Path | str,
    *,
    step: int,
    write: Callable[[Path], Any],
    meta: Mapping[str, Any],
    keep_last: int,
    needed_bytes: int | None = None,
) -> Path:
    """Write the checkpoint of `step` and return its directory; then keep it and the `keep_last` - 1 before
    it.

    `write(folder)` puts the files into a temporary folder, subfolders allowed. `meta` must be JSON.
    `needed_bytes` is compared with the free space first; default: what the newest checkpoint here takes.
    Whatever fails, and wherever the process dies, every checkpoint that was complete before stays as it was.
    Raises CheckpointError on a full disk.
    """
    if keep_last < 1:
        raise ValueError(
            f"keep_last={keep_last} would delete the checkpoint just written; use keep_last >= 1"
        )
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    remove_temporaries(root)
    needed = _newest_size(root) if needed_bytes is None else needed_bytes
    _check_space(root, needed)
    temporary = root / f"{_TEMPORARY}save-{os.getpid()}-{step:08d}"
    temporary.mkdir()
    try:
        write(temporary)
        fault_point("checkpoint.write")
        _write_manifest(temporary, step, meta)
        fault_point("checkpoint.before_rename")
    except BaseException as error:
        written = _folder_size(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            # What it was given was not enough, however little of it is still there: safetensors cleans up by itself.
            at_least = max(needed, written, shutil.disk_usage(root).free)
            raise CheckpointError(_no_space(root, at_least, "at least ")) from error
        raise
    final = root / f"step-{step:08d}"
    _replace(temporary, final)
    fault_point("checkpoint.after_rename")
    _delete_old(root, step, keep_last)
    return final


def check_space(root: Path, *, checkpoint_bytes: int, keep_last: int, model_bytes: int) -> None:
    """Raise CheckpointError if the disk of `root` cannot hold what a stage writes: `keep_last` checkpoints and the one
    that is being written, less those that are there, and its model at the end."""
    there = sum(_folder_size(path) for path, _, _ in _candidates(root))
    needed = max(0, (keep_last + 1) * checkpoint_bytes - there) + model_bytes
    place = next(p for p in (root, *root.parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"the disk of {place} has {free / 1e9:.3f} GB free; this stage needs {needed / 1e9:.3f} GB: run.keep_last + 1 = "
            f"{keep_last + 1} checkpoints of {checkpoint_bytes / 1e9:.3f} GB (12 bytes a trained weight), of which "
            f"{there / 1e9:.3f} GB are there, and a model of {model_bytes / 1e9:.3f} GB. Free some space, lower "
            "run.keep_last, set run.output_dir to another disk, or train fewer weights (model.lora)"
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because there is no space left; safetensors says it in words only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOSPC
    return f"os error {errno.ENOSPC}" in str(error)


def remove_temporaries(root: Path | str) -> None:
    """Delete what interrupted saves and deletions left in `root`. Only the holder of `run_lock` may do
    this."""
    for leftover in Path(root).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def _write_manifest(folder: Path, step: int, meta: Mapping[str, Any]) -> None:
    """Flush every file of `folder`, describe them all in its manifest, and flush that."""
    files = {}
    for path in _files(folder):
        flush_to_disk(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    body = {"format": FORMAT, "step": step, "meta": dict(meta), "files": files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"sha256": _sha256_of(body), "body": body}, indent=1), encoding="utf-8")
    flush_to_disk(manifest)
    for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        flush_to_disk(directory)


def _replace(temporary: Path, final: Path) -> None:
    """Give the finished checkpoint its name. A predecessor of the same name counts until the new one is in
    place."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        if old.exists():
            _delete(old)
        final.rename(old)
    temporary.rename(final)
    flush_to_disk(final.parent)
    if old.exists():
        _delete(old)


def _delete_old(root: Path, step: int, keep_last: int) -> None:
    older = [path for path, at, _ in _candidates(root) if at < step]
    for path in older[keep_last - 1 :]:
        fault_point("checkpoint.delete_old")
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint so that a half-deleted one never looks like a damaged one."""
    gone = path.with_name(f"{_TEMPORARY}delete-{path.name}")
    path.rename(gone)
    shutil.rmtree(gone)


def _check_space(root: Path, needed: int) -> None:
    if shutil.disk_usage(root).free < needed:
        raise CheckpointError(_no_space(root, needed))


def _no_space(root: Path, needed: int, bound: str = "") -> str:
    free = shutil.disk_usage(root).free
    return (
        f"no space for a checkpoint in {root}: it needs {bound}{needed / 1e9:.3f} GB and {free / 1e9:.3f} GB are "
        "free. Free some space, lower run.keep_last, or set run.output_dir to another disk; the older "
        "checkpoints are untouched"
    )


def _newest_size(root: Path) -> int:
    newest = next((path for path, _, _ in _candidates(root)), None)
    return _folder_size(newest) if newest else 0


# -- finding -------------------------------------------------------------------------------------------------


def find_checkpoint(root: Path | str) -> Checkpoint | None:
    """The newest checkpoint in `root` whose files all agree with its manifest; None if there is no
    checkpoint.

    Damaged ones are passed over, logged as warnings and listed in the result. Raises CheckpointError if there
    are checkpoints and all are damaged, or if one was written in another format.
    """
    damaged: list[Damaged] = []
    for path, step, _ in _candidates(Path(root)):
        try:
            body = _verified_manifest(path, step)
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(Damaged(path, str(error) or type(error).__name__))
            _log.warning("checkpoint %s is damaged and passed over: %s", path, damaged[-1].reason)
            continue
        return Checkpoint(path, step, body["meta"], tuple(damaged))
    if damaged:
        reasons = "".join(f"\n  {d.path}: {d.reason}" for d in damaged)
        raise CheckpointError(
            f"every checkpoint in {root} is damaged, and a fresh start would hide it:{reasons}\n"
            "Restore one from a backup, or move the folder away to start again"
        )
    return None


def _candidates(root: Path) -> list[tuple[Path, int, bool]]:
    """(path, step, is a predecessor about to be replaced), newest first."""
    if not root.is_dir():
        return []
    matches = [(path, _NAME.fullmatch(path.name)) for path in root.iterdir() if path.is_dir()]
    found = [(path, int(m[1]), m[2] is not None) for path, m in matches if m]
    return sorted(found, key=lambda entry: (-entry[1], entry[2]))


def _verified_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest's body, after comparing every file with it. ValueError and the like say what is wrong."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{MANIFEST} is missing")
    content = json.loads(manifest.read_bytes())
    body = content["body"]
    if content["sha256"] != _sha256_of(body):
        raise ValueError(f"{MANIFEST} does not agree with its own hash")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {body['format']}, this version of rlhf reads format {FORMAT}; "
            "continue with the version that wrote it"
        )
    if body["step"] != step:
        raise ValueError(f"it is named step {step} but was written as step {body['step']}")
    for name, facts in body["files"].items():
        _verify_file(folder, name, facts)
    return body


def _verify_file(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the manifest names {name!r}, which lies outside the checkpoint")
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise ValueError(f"{name} has {size} bytes, {facts['bytes']} were written")
    if _sha256(path) != facts["sha256"]:
        raise ValueError(f"{name} has the right size but other content than was written")


# -- tensors -------------------------------------------------------------------------------------------------


def save_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors by name as one safetensors file."""
    save_file(
        {name: t.detach().contiguous().cpu() for name, t in tensors.items()}, str(path), {"format": "pt"}
    )


def load_tensors(path: Path | str) -> dict[str, torch.Tensor]:
    """Read what `save_tensors` wrote, on the CPU. Raises CheckpointError for any other kind of file: never
    unpickles."""
    try:
        return load_file(str(path), device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


# -- files ---------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sha256_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
