"""NEFTune: noise on the input embeddings while training.

Here: the noise as a function of (seed, update, sample, position, feature), so that it depends neither on how the step is
cut nor on the processes, and a resumed run repeats it. Not here: when a forward is a training forward
(`rlhf.trainers.deepspeed_engine`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf import rng
from rlhf.kernels.random import uniform
from rlhf.records import Batch


def embedding_noise(
    batch: Batch, width: int, *, alpha: float, seed: int, update: int, dtype: torch.dtype
) -> torch.Tensor:
    """Uniform noise in +-alpha / sqrt(length * width) for each real token of each row, rows end to end as in a pack:
    (N, width) of `dtype` on the batch's device, where length is the row's own (2310.05914, algorithm 1).
    """
    device = batch.token_ids.device
    features = torch.arange(width, device=device)
    rows = []
    for sample_id, length in zip(batch.sample_ids, batch.lengths.tolist(), strict=True):
        key = torch.tensor(rng.key(seed, "neftune", update, sample_id), device=device)
        draws = uniform(key, torch.arange(length, device=device)[:, None] * width + features)
        rows.append(((2.0 * draws - 1.0) * (alpha / math.sqrt(length * width))).to(dtype))
    return torch.cat(rows)


class EmbeddingNoise:
    """Adds the noise to what the model's input embedding gives, inside `on` only."""

    def __init__(self, model: torch.nn.Module, *, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._current: tuple[Batch, int] | None = None
        self._hook = model.get_input_embeddings().register_forward_hook(self._add)

    @contextmanager
    def on(self, batch: Batch, update: int) -> Iterator[None]:
        """Within it the model's forward is one pack of the whole `batch`, in training for update number `update`."""
        self._current = batch, update
        try:
            yield
        finally:
            self._current = None

    def _add(self, module: torch.nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        if self._current is None:
            return None
        batch, update = self._current
        tokens = int(batch.lengths.sum())
        assert embedded.shape[:2] == (1, tokens), (
            f"embeddings {tuple(embedded.shape)} of a pack of {tokens} tokens"
        )
        noise = embedding_noise(
            batch,
            embedded.shape[-1],
            alpha=self._alpha,
            seed=self._seed,
            update=update,
            dtype=embedded.dtype,
        )
        return embedded + noise

    def remove(self) -> None:
        self._hook.remove()
