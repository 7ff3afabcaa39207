"""Several training sets as one: their rows one after another, each as often as its set's weight says.

The order in which rows are visited is that of `rlhf.data.cursor`, a permutation of all of them, so that the sets are
mixed in every step. Not here: reading a set (the loaders).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence

from rlhf.data.rows import Dataset, Item


def mixed(datasets: Sequence[Dataset[Item]], weights: Sequence[float]) -> Dataset[Item]:
    """One dataset of all. A row of a set with weight w comes floor(w) times, and of the rest w - floor(w) every
    1 / (w - floor(w))-th row once more; a single set with weight 1 is returned as it is.

    Raises ValueError for a set of which no row would be left.
    """
    if len(datasets) == 1 and weights[0] == 1:
        return datasets[0]
    items: list[Item] = []
    counts: Counter[str] = Counter()
    for dataset, weight in zip(datasets, weights, strict=True):
        taken = [item for i, item in enumerate(dataset.items) for _ in range(_times(i, weight))]
        if not taken:
            raise ValueError(f"weight={weight:g} leaves none of a set's {len(dataset)} rows; raise it")
        items += taken
        counts.update(dataset.counts)
    described = json.dumps([[d.fingerprint, w] for d, w in zip(datasets, weights, strict=True)])
    fingerprint = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    return type(datasets[0])(tuple(items), fingerprint, {**counts, "kept": len(items)})


def _times(index: int, weight: float) -> int:
    """How often row `index` comes: the running total of the weight is rounded down, so that a share is spread evenly."""
    return math.floor((index + 1) * weight) - math.floor(index * weight)
