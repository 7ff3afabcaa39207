"""Counter-based random numbers on the device: one draw per (key, position), the same in any batch and on any
device.

Here: the SplitMix64 generator read as a function of its counter. Not here: keys (`rlhf.rng.key`) and what the
numbers are used for (`rlhf.kernels.sampling`).
"""

from __future__ import annotations

import torch


def _signed(value: int) -> int:
    """A 64-bit word as the int64 that has the same bits."""
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: int64's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


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
    """A number in [0, 1) for each (key, position): float64 with 52 random bits.

    52 bits, not 53, so that `uniform * total < total` holds after rounding for every positive float64 total.
    """
    return _shift_right(random_bits(keys, positions), 12).to(torch.float64) * 2.0**-52
