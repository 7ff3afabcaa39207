"""NEFTune's noise: its size, and that it is a function of names."""

from __future__ import annotations

import math

import torch

from rlhf.batching import SftExample, make_sft_batch
from rlhf.records import Batch
from rlhf.trainers.neftune import embedding_noise

LENGTHS = (40, 3, 17)


def batch() -> Batch:
    return make_sft_batch([SftExample(f"row {n}", (1,), (2,) * (n - 1)) for n in LENGTHS])


def noise(batch: Batch, **changes: object) -> torch.Tensor:
    options = {"alpha": 5.0, "seed": 0, "update": 3, "dtype": torch.float32}
    return embedding_noise(batch, 64, **(options | changes))


def test_size_is_that_of_the_paper() -> None:
    """Would catch: the length of the pack or of the longest row in place of the row's own, noise that is not centred."""
    for n, rows in zip(LENGTHS, noise(batch()).split(LENGTHS), strict=True):
        bound = 5.0 / math.sqrt(n * 64)
        assert rows.shape == (n, 64) and 0.97 * bound < float(rows.abs().max()) <= bound
        assert abs(float(rows.std()) - bound / math.sqrt(3)) < 0.1 * bound
        assert abs(float(rows.mean())) < 0.1 * bound


def test_it_follows_the_sample_wherever_it_goes() -> None:
    """Would catch: noise that changes with the micro-batch plan, that repeats in every update or for every row, or
    that is drawn in the weights' type."""
    whole = noise(batch()).split(LENGTHS)
    for rows in ([2, 0], [1], [0, 1, 2]):
        got = noise(batch().select(rows)).split([LENGTHS[row] for row in rows])
        assert all(torch.equal(g, whole[row]) for g, row in zip(got, rows, strict=True))
    assert not torch.allclose(whole[0][:3], whole[1] * math.sqrt(3 / 40))
    for other in (noise(batch(), update=4), noise(batch(), seed=1)):
        assert float((other - torch.cat(whole)).abs().mean()) > 0.01
    assert torch.equal(noise(batch(), dtype=torch.bfloat16), torch.cat(whole).bfloat16())
