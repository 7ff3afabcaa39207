"""A reference's log-probs of a whole dataset, computed once and kept beside the checkpoints, or where runs share them.

A reference that never moves gives the same numbers in every epoch, and after a resume the actor it was taken from is
gone. The file is bound to what it was computed from by fingerprints. Not here: who computes (`rlhf.trainers.roles`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlhf.batching import in_batches
from rlhf.faults import fault_point
from rlhf.records import Batch
from rlhf.runlog import flush_to_disk

Identity = Mapping[str, Mapping[str, str]]  # {what: {part: hash}}, see rlhf.runtime.identity


class ReferenceCache:
    """Log-probs by sample id."""

    def __init__(self, logprobs: Mapping[str, torch.Tensor], made_from: str) -> None:
        self._logprobs, self._made_from = logprobs, made_from  # sample id -> (loss tokens,) fp32

    @classmethod
    def load(cls, path: Path, datasets: Mapping[str, Any], fingerprint: Identity) -> ReferenceCache | None:
        """The cache at `path`; None if there is none, if it is damaged, or was made from other data or weights."""
        made_from = _made_from(datasets, fingerprint)
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                logprobs, lengths = file.get_tensor("logprobs"), file.get_tensor("lengths")
        except (FileNotFoundError, SafetensorError):
            return None
        if (about.get("made_from"), about.get("sha256")) != (made_from, _hash(logprobs, lengths)):
            return None
        ids = json.loads(about["ids"])
        return cls(dict(zip(ids, logprobs.split(lengths.tolist()), strict=True)), made_from)

    @classmethod
    def make(
        cls,
        datasets: Mapping[str, Sequence[Any]],
        make_batch: Callable[[Sequence[Any]], Batch],
        score: Callable[[Batch], torch.Tensor],
        fingerprint: Identity,
    ) -> ReferenceCache:
        """A new cache. `score` gives (B, T) log-probs of a batch's response tokens; a row that comes several times, as
        in a mixture, is scored once. Raises ValueError for an id that stands for two rows."""
        logprobs: dict[str, torch.Tensor] = {}
        for batch in in_batches(_different_rows(datasets), make_batch):
            scores = score(batch)
            fault_point("reference.mid")
            for i, sample in enumerate(batch.sample_ids):
                logprobs[sample] = scores[i][batch.loss_mask[i]].clone()
        return cls(logprobs, _made_from(datasets, fingerprint))

    def look_up(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: the reference's log-probs at the batch's loss mask, 0 elsewhere."""
        scores = torch.zeros(batch.token_ids.shape)
        for i, sample in enumerate(batch.sample_ids):
            scores[i][batch.loss_mask[i]] = self._logprobs[sample]
        return scores

    def save(self, path: Path) -> None:
        """Write the file at `path`, whole or not at all; several runs may do so at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        values = list(self._logprobs.values())
        tensors = {"logprobs": torch.cat(values), "lengths": torch.tensor([len(v) for v in values])}
        about = {
            "made_from": self._made_from,
            "ids": json.dumps(list(self._logprobs)),
            "sha256": _hash(*tensors.values()),
        }
        save_file(tensors, partial, metadata=about)
        flush_to_disk(partial)
        partial.rename(path)
        flush_to_disk(path.parent)


def shared_file(folder: Path, datasets: Mapping[str, Any], fingerprint: Identity) -> Path:
    """Where runs that compute the same log-probs find one another's file."""
    name = hashlib.sha256(_made_from(datasets, fingerprint).encode()).hexdigest()[:16]
    return folder / f"reference-{name}.safetensors"


def _different_rows(datasets: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Every row of the sets once, in their order."""
    rows: dict[str, Any] = {}
    for dataset in datasets.values():
        for i in range(len(dataset)):
            row = dataset[i]
            if rows.setdefault(row.id, row) != row:
                raise ValueError(f"two rows have the id {row.id!r}; give the evaluation set another name")
    return list(rows.values())


def _made_from(datasets: Mapping[str, Any], fingerprint: Identity) -> str:
    return json.dumps({**fingerprint, "sets": sorted(datasets)}, sort_keys=True)


def _hash(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
