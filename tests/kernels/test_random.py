import random

import numpy as np
import pytest
import torch

from rlhf.kernels.random import exponentials, random_bits, token_words, uniform

MASK = (1 << 64) - 1
LOW = (1 << 32) - 1
COUNT = 1 << 17


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


def word(bits: int, token: int) -> int:
    """A token's word in Python integers."""
    bits &= MASK
    x = (token * 0x9E3779B9 + (bits & LOW)) & LOW
    x = ((x ^ (x >> 17)) * 0xED5AD4BB) & LOW
    x = ((x ^ (x >> 11)) + (bits >> 32)) & LOW
    x = (x * 0xAC4C1B51) & LOW
    x = ((x ^ (x >> 15)) * 0x31848BAB) & LOW
    return x ^ (x >> 14)


def bits(keys, positions) -> list[int]:
    return [int(x) & MASK for x in random_bits(torch.tensor(keys), torch.tensor(positions)).flatten()]


def words(keys, positions, tokens) -> np.ndarray:
    row = random_bits(torch.as_tensor(keys), torch.as_tensor(positions))
    return token_words(row, torch.as_tensor(tokens)).numpy()


def test_known_answers():
    # catches a wrong constant or an arithmetic shift: the first outputs of SplitMix64 for seed 1234567
    assert bits([1234567] * 3, [0, 1, 2]) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_equals_the_generator_for_large_keys():
    # catches sign trouble in the int64 arithmetic, which small keys do not show
    source = random.Random(0)
    for _ in range(50):
        key = source.getrandbits(63)
        assert bits([key] * 4, [0, 1, 2, 3]) == splitmix64(key, 4)


def test_known_words():
    # catches a change of the noise, after which no run of before can be repeated
    first = [1260452076, 3725611736, 2993229148, 1375982303]
    assert words([1234567], [0], [0, 1, 2, 3]).tolist() == first
    assert words([1 << 62], [1000], [151_935]).tolist() == [word(splitmix64(1 << 62, 1001)[-1], 151_935)]


def test_words_equal_python_integers():
    # catches sign trouble in the int32 arithmetic: rows and tokens of any size
    source = random.Random(1)
    rows = [source.getrandbits(64) for _ in range(60)]
    tokens = [source.getrandbits(18) for _ in range(60)]
    signed = torch.tensor([r - (1 << 64) if r >> 63 else r for r in rows])
    assert token_words(signed, torch.tensor(tokens)).tolist() == [word(*x) for x in zip(rows, tokens)]


def test_a_draw_does_not_depend_on_its_batch():
    # catches vector and tail paths that differ, or a stream behind the function
    keys = torch.randint(0, 1 << 62, (37,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(37)
    together = uniform(keys, positions)
    for i in range(37):
        assert uniform(keys[i : i + 1], positions[i : i + 1]) == together[i]


def test_uniform_is_below_one():
    # catches a last bit that rounds up to 1, or a first that makes numbers negative
    draws = uniform(torch.arange(100_000), torch.zeros(1, dtype=torch.long))
    assert draws.dtype == torch.float64 and draws.min() >= 0 and draws.max() < 1
    assert ((draws * 2.0**52) % 1 == 0).all()


def chi_square(bins: np.ndarray, count: int) -> float:
    expected = len(bins) / count
    return ((np.bincount(bins, minlength=count) - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("along", ["keys", "positions"])
def test_uniform_is_uniform_and_uncorrelated(along):
    # catches weak mixing of neighbouring keys or positions
    count = torch.arange(COUNT)
    zero = torch.zeros_like(count)
    draws = (uniform(count, zero) if along == "keys" else uniform(zero + 99, count)).numpy()
    assert 150 < chi_square((draws * 256).astype(int), 256) < 380  # 255 degrees of freedom: deviation 22.6
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.015


def series(along: str) -> np.ndarray:
    """Words of neighbours."""
    count = np.arange(COUNT)
    if (
        along == "overlapping rows"
    ):  # token j of a row is token j + 1 of the row before as far as the low words say
        low = (count * 0x9E3779B9) & LOW
        high = words(count % 64, 3, 0) << 32
        return token_words(torch.from_numpy(low + high), torch.tensor(5)).numpy()
    places = {"keys": (count, 5, 7), "positions": (99, count, 7), "tokens": (99, 5, count)}
    return words(*places[along])


@pytest.mark.parametrize("along", ["keys", "positions", "tokens", "overlapping rows"])
def test_words_are_uniform_and_uncorrelated(along):
    # catches weak mixing of neighbours: in the first bits, the last, and of two or three neighbours together
    found = series(along)
    for shift in (0, 8, 16, 24):
        assert 150 < chi_square((found >> shift) & 255, 256) < 380
    for step in (1, 2, 16, 64):
        pairs = (found[:-step] >> 28) * 16 + (found[step:] >> 28)
        assert 150 < chi_square(pairs, 256) < 380
        flips = np.unpackbits((found[step:] ^ found[:-step]).astype(np.uint32).view(np.uint8)).mean()
        assert abs(flips - 0.5) < 0.002  # 4 million bits: deviation 0.00024
        assert abs(np.corrcoef(found[step:], found[:-step])[0, 1]) < 0.015
    triples = (found[:-2] >> 30) * 16 + (found[1:-1] >> 30) * 4 + (found[2:] >> 30)
    assert 25 < chi_square(triples, 64) < 115  # 63 degrees of freedom: deviation 11.2


def test_small_words_come_at_their_rate():
    # catches a tail that is missing: the smallest of many decide who wins. 8 million words of 64 rows
    found = words(np.arange(64)[:, None] * 7, 11, np.arange(1 << 17)[None]).astype(np.float64)
    for share in (1e-2, 1e-3, 1e-4, 1e-5, 2e-6):
        expected = share * found.size
        assert abs((found < share * 2**32).sum() - expected) < 5 * expected**0.5
    smallest = found.min(1) * found.shape[1] / 2**32  # of each row: exponential variables of mean 1
    assert 0.5 < smallest.mean() < 1.5


def test_exponentials_are_exact_where_they_are_small():
    # catches -log(x) or bits cut off: the winner of 150,000 tokens has e of about 1e-5, a rare one's 1e-9
    taken = [0, 1, 2, 3, 100, 12345, 1 << 20, 1 << 26, 1 << 29, 1258046600, 1 << 31, 3 << 30]
    found = exponentials(torch.tensor(taken)).double().numpy()
    np.testing.assert_allclose(found, -np.log1p(-(np.array(taken) + 0.5) * 2.0**-32), rtol=2e-6)
    assert found[0] == 2.0**-33
    assert exponentials(torch.tensor([LOW]))[0] == pytest.approx(24 * np.log(2))  # never infinite


def test_exponentials_have_the_distribution():
    # catches a wrong sign or scale: the mean, and the share beyond 1, 3 and 8
    found = exponentials(torch.from_numpy(words(np.arange(32)[:, None], 0, np.arange(1 << 15)))).double()
    assert float(found.mean()) == pytest.approx(1, abs=0.005)
    for beyond in (1.0, 3.0, 8.0):
        expected = float(np.exp(-beyond)) * found.numel()
        assert abs(int((found > beyond).sum()) - expected) < 5 * expected**0.5
