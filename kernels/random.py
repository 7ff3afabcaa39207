"""Counter-based random numbers on the device: a function of (key, position), or of (key, position, token), the same in
any batch and on any device.

Here: the SplitMix64 generator read as a function of its counter; the words of a row's tokens, and the exponential
variables made of them. Not here: keys (`rlhf.rng.key`) and what the numbers are used for (`rlhf.kernels.sampling`, whose
C++ and Triton forms make the same words).
"""

from __future__ import annotations

import torch


def _signed(value: int, bits: int = 64) -> int:
    """A word as the signed integer that has the same bits."""
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_STRIDE = _signed(0x9E3779B9, 32)
_WORD_1 = _signed(0xED5AD4BB, 32)
_WORD_2 = _signed(0xAC4C1B51, 32)
_WORD_3 = _signed(0x31848BAB, 32)
_MOST = 1 - 2.0**-24  # largest fp32 below 1


def _shift_right(x: torch.Tensor, bits: int, width: int = 64) -> torch.Tensor:
    """Logical shift: a signed integer's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (width - bits)) - 1)


def random_bits(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """64 random bits: output number `position` of SplitMix64 seeded with `key` (Steele et al., OOPSLA 2014).

    keys, positions: int64, broadcastable; every key is good, but keys should themselves be hashes
    (`rlhf.rng.key`). Returns int64 of the broadcast shape. Integer arithmetic wraps, so every device gives
    the same bits.
    """
    x = keys + (positions + 1) * _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each (key, position): float64 with 52 random bits."""
    return _shift_right(random_bits(keys, positions), 12).to(torch.float64) * 2.0**-52


def token_words(bits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """32 random bits for each (row, token): int64 in [0, 2^32) of the broadcast shape.

    bits: int64, the row's `random_bits`; tokens: int64, below 2^32. A Weyl sequence over the tokens that starts at the row's
    low word goes through three multiplications and four shifts (Wellons' triple32), the row's high word added after the
    first: rows whose sequences overlap get other words from there on.
    """
    x = tokens.int() * _STRIDE + bits.int()
    x = (x ^ _shift_right(x, 17, 32)) * _WORD_1
    x = (x ^ _shift_right(x, 11, 32)) + (bits >> 32).int()
    x = x * _WORD_2
    x = (x ^ _shift_right(x, 15, 32)) * _WORD_3
    return (x ^ _shift_right(x, 14, 32)).long() & 0xFFFFFFFF


def exponentials(words: torch.Tensor) -> torch.Tensor:
    """Exponential variables of mean 1, fp32, from `token_words`: e = -log(1 - x) with x = (word + 1/2) 2^-32.

    Of many the smallest wins, so that small ones are exact to fp32's relative precision, down to 2^-33: a token of
    probability 2^-30 is still drawn at its rate. -log(x) with the same x would be coarse there. Large ones, which lose, stop
    at 16.6: x is kept below 1.
    """
    x = (words.float() + 0.5).mul_(2.0**-32).clamp_(max=_MOST)
    return x.neg_().log1p_().neg_()
