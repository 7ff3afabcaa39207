"""The order in which rows are visited, as a function of how many were taken before: one number to save.

Not here: the rows themselves (`rlhf.data.prompts`).
"""

from __future__ import annotations

from rlhf.rng import permutation


def rows_from(n: int, *, seed: int, position: int, count: int) -> list[int]:
    """The next `count` rows of a dataset of n rows, of which `position` were taken before.

    The epochs' permutations (`rlhf.rng.permutation`) are laid end to end, so the rows may run over the border between
    two epochs, and may then hold a row twice. Raises ValueError if the dataset has fewer than `count` rows.
    """
    _check(n, count)
    if position < 0:
        raise ValueError(f"position={position} is negative; positions count from 0")
    rows: list[int] = []
    end = position + count
    while position < end:
        epoch, offset = divmod(position, n)
        take = min(n - offset, end - position)
        rows.extend(permutation(n, seed, epoch)[offset : offset + take].tolist())
        position += take
    return rows


def num_steps(n: int, *, epochs: int, rows_per_step: int) -> int:
    """Steps in which every row is visited at least `epochs` times; the last one may run on into the next
    epoch."""
    _check(n, rows_per_step)
    return -(-n * epochs // rows_per_step)


def _check(n: int, rows_per_step: int) -> None:
    if n < rows_per_step:
        raise ValueError(
            f"the dataset has {n} rows, fewer than one step's {rows_per_step}; "
            f"lower trainer.prompts_per_step to at most {n} or add data"
        )
