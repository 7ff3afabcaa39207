"""A reference's log-probs of a whole dataset, computed once and kept beside the checkpoints.

A reference that never moves gives the same numbers in every epoch, and after a resume the actor it was taken from is
gone. The file is bound to what it was computed from by fingerprints. Not here: who computes (`rlhf.trainers.roles`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf.checkpoint import flush_to_disk
from rlhf.records import Batch

_ROWS_AT_ONCE = 256


class ReferenceCache:
    """Log-probs by sample id."""

    def __init__(self, logprobs: Mapping[str, torch.Tensor]) -> None:
        self._logprobs = logprobs  # sample id -> (loss tokens,) fp32

    @classmethod
    def load_or_make(
        cls,
        path: Path,
        datasets: Mapping[str, Sequence[Any]],
        make_batch: Callable[[Sequence[Any]], Batch],
        score: Callable[[Batch], torch.Tensor],
        fingerprint: Mapping[str, str],
    ) -> ReferenceCache:
        """The cache at `path` if it was made from the same data and weights, else a new one, written there.

        `score` gives (B, T) log-probs of a batch's response tokens.
        """
        made_from = json.dumps({**fingerprint, "sets": sorted(datasets)}, sort_keys=True)
        if path.is_file():
            with safe_open(path, "pt") as file:
                if file.metadata().get("made_from") == made_from:
                    ids, lengths = json.loads(file.metadata()["ids"]), file.get_tensor("lengths").tolist()
                    return cls(dict(zip(ids, file.get_tensor("logprobs").split(lengths), strict=True)))
        logprobs: dict[str, torch.Tensor] = {}
        for dataset in datasets.values():
            for start in range(0, len(dataset), _ROWS_AT_ONCE):
                rows = [dataset[i] for i in range(start, min(start + _ROWS_AT_ONCE, len(dataset)))]
                batch = make_batch(rows)
                scores = score(batch)
                for i, sample in enumerate(batch.sample_ids):
                    logprobs[sample] = scores[i][batch.loss_mask[i]].clone()
        cache = cls(logprobs)
        cache._write(path, made_from)
        return cache

    def look_up(self, batch: Batch) -> torch.Tensor:
        """(B, T) fp32: the reference's log-probs at the batch's loss mask, 0 elsewhere."""
        scores = torch.zeros(batch.token_ids.shape)
        for i, sample in enumerate(batch.sample_ids):
            scores[i][batch.loss_mask[i]] = self._logprobs[sample]
        return scores

    def _write(self, path: Path, made_from: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        values = list(self._logprobs.values())
        tensors = {"logprobs": torch.cat(values), "lengths": torch.tensor([len(v) for v in values])}
        save_file(tensors, partial, metadata={"made_from": made_from, "ids": json.dumps(list(self._logprobs))})
        flush_to_disk(partial)
        partial.rename(path)
        flush_to_disk(path.parent)
