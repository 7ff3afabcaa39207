"""The position in the data, as a function of the step: nothing to save, nothing to restore.

Not here: the rows themselves (`rlhf.data.prompts`).
"""

from __future__ import annotations

from rlhf.rng import permutation


def step_rows(n: int, *, seed: int, step: int, rows_per_step: int) -> list[int]:
    """The rows of step `step`, counted from 0, of a dataset of n rows.

    The epochs' permutations (`rlhf.rng.permutation`) are laid end to end and cut into steps, so a step may
    run over the border between two epochs, and may then hold a row twice. Raises ValueError if the dataset is
    smaller than a step.
    """
    _check(n, rows_per_step)
    if step < 0:
        raise ValueError(f"step={step} is negative; steps count from 0")
    rows: list[int] = []
    position, end = step * rows_per_step, (step + 1) * rows_per_step
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
