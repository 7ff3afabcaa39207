import random

import numpy as np
import pytest
import torch

from rlhf.kernels.random import random_bits, uniform

MASK = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published, in Python integers."""
    out, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def bits(keys, positions) -> list[int]:
    return [int(x) & MASK for x in random_bits(torch.tensor(keys), torch.tensor(positions)).flatten()]


def test_known_answers():
    # catches a wrong constant or an arithmetic shift: the first outputs of SplitMix64 for seed 1234567
    assert bits([1234567] * 3, [0, 1, 2]) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_equals_the_generator_for_large_keys():
    # catches sign trouble in the int64 arithmetic, which small keys do not show
    source = random.Random(0)
    for _ in range(50):
        key = source.getrandbits(63)
        assert bits([key] * 4, [0, 1, 2, 3]) == splitmix64(key, 4)


def test_a_draw_does_not_depend_on_its_batch():
    # catches vector and tail paths that differ, or a stream behind the function
    keys = torch.randint(0, 1 << 62, (37,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(37)
    together = uniform(keys, positions)
    for i in range(37):
        assert uniform(keys[i : i + 1], positions[i : i + 1]) == together[i]


def test_uniform_stays_below_every_total():
    # catches a draw past the end of the cumulative distribution: with 53 bits, u * total can round to total
    largest = (2.0**52 - 1) * 2.0**-52
    totals = np.random.default_rng(0).uniform(0.1, 4, 100_000)
    assert (largest * totals < totals).all()
    draws = uniform(torch.arange(100_000), torch.zeros(1, dtype=torch.long))
    assert draws.dtype == torch.float64 and draws.min() >= 0 and draws.max() < 1
    assert ((draws * 2.0**52) % 1 == 0).all()


@pytest.mark.parametrize("along", ["keys", "positions"])
def test_uniform_is_uniform_and_uncorrelated(along):
    # catches weak mixing of neighbouring keys or positions
    count = torch.arange(1 << 17)
    zero = torch.zeros_like(count)
    draws = (uniform(count, zero) if along == "keys" else uniform(zero + 99, count)).numpy()
    observed = np.bincount((draws * 256).astype(int), minlength=256)
    expected = len(draws) / 256
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert 150 < chi_square < 380  # 255 degrees of freedom: mean 255, deviation 22.6
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.015
