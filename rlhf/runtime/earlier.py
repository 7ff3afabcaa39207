"""What an earlier run left in a plan's run directory, told from its files alone: nothing here imports torch.

Here: where a plan runs, whether it is finished, and whether the directory holds another recipe's run. Not here: going on
from a checkpoint (`rlhf.runtime.run`), and whether files behind the recipe's names changed (`rlhf.runtime.identity`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rlhf.recipe.load import Plan, dump_plan

# Changing these between two runs of the same command does not change what the run computes.
# Where a different number of processes or cut of the batch changes the rounding, the curve stays within 1e-5.
_MAY_CHANGE = (
    "tracking",
    "placement",
    "run.save_every",
    "run.keep_last",
    "run.output_dir",
    "runtime.backend",
    "runtime.launch_timeout_s",
    "runtime.call_timeout_s",
    "runtime.weight_transport",
    "runtime.bucket_mb",
    "runtime.ray_address",
    "rollout.page_tokens",
    "rollout.cache_tokens",
    "rollout.max_batch_tokens",
    "rollout.max_sequences",
    "rollout.prefix_cache",
    "rollout.prefill_processes",
    "trainer.micro_batch_tokens",
    "trainer.zero_stage",
    "trainer.offload_optimizer",
)


def run_directory(plan: Plan) -> Path:
    run = plan.stages[0].recipe.run
    return Path(run.output_dir) / run.name


def is_finished(plan: Plan) -> bool:
    """Whether the plan was run to its end before. Raises ValueError, naming the keys, if its directory holds a run of
    another recipe."""
    run_dir = run_directory(plan)
    if any(run_dir.glob("stages/*/*")):  # before the first checkpoint nothing binds the run to its recipe
        _check_same_recipe(run_dir / "recipe.yaml", dump_plan(plan))
    return (run_dir / "finished.json").is_file()


def finished_message(run_dir: Path) -> str:
    return (
        f"{run_dir} is already finished; --fresh (in Python train(fresh=True)) moves it aside and runs again"
    )


def _check_same_recipe(path: Path, resolved: str) -> None:
    changed = changed_keys(path.read_text(), resolved) if path.is_file() else []
    if changed:
        raise ValueError(
            f"{path.parent} holds a run of another recipe ({'; '.join(changed)}); choose another run.name (in Python "
            "name=), or --fresh (train(fresh=True)) to move that run aside"
        )


def changed_keys(before_yaml: str, now_yaml: str) -> list[str]:
    """The keys in which two resolved recipes compute different things: "key: before -> now"."""
    before, now = _flat(yaml.safe_load(before_yaml)), _flat(yaml.safe_load(now_yaml))
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _may_change(key)
    ]


def _may_change(key: str) -> bool:
    parts = key.split(".")
    if parts[0] == "stages":
        parts = parts[2:]
    path = ".".join(parts)
    return any(path == free or path.startswith(f"{free}.") for free in _MAY_CHANGE)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}
