"""Random numbers as a function of names, never of a stream.

Every random choice in a run is keyed by (seed, purpose, step, sample, ...), so that results depend neither on the
order in which things finish nor on how many processes there are. Draws on the device, one per (key, position), are in
`rlhf.kernels.random`.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, purpose: str, *parts: int | str) -> int:
    """A 63-bit key for one purpose: the same arguments give the same key on every machine and Python version."""
    text = "\x1f".join([str(seed), purpose, *(str(p) for p in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """A numpy generator of its own for one purpose (Philox, keyed by `key`)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *parts)))


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits n rows: a function of (n, seed, epoch). (n,) int64."""
    return generator(seed, "data", epoch).permutation(n)
