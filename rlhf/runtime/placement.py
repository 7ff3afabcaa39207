"""Whether a plan fits the machines, before anything is launched. Resources are plain numbers, no Ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.runtime.groups import GroupSpec, PlacementError

# What one process reserves. A process's threads are not reserved: they are set for the machine that runs it,
# which the controller does not know.
CPUS_PER_PROCESS = 1


def bundle(spec: GroupSpec) -> dict[str, float]:
    """What one process of the group reserves."""
    reserved = {"CPU": float(CPUS_PER_PROCESS)}
    if spec.gpus:
        reserved["GPU"] = 1.0
    return reserved


def needed(specs: Sequence[GroupSpec]) -> dict[str, float]:
    """What all groups reserve together; they all live at the same time."""
    return {
        "CPU": float(CPUS_PER_PROCESS * sum(spec.num_processes for spec in specs)),
        "GPU": float(sum(spec.gpus for spec in specs)),
    }


def check(specs: Sequence[GroupSpec], resources: Mapping[str, float]) -> None:
    """Raise PlacementError if even the idle cluster, with these "CPU" and "GPU", cannot hold the plan."""
    for kind, noun, key in (("GPU", "GPUs", "gpus"), ("CPU", "CPUs", "processes")):
        there = resources.get(kind, 0.0)
        asked = {spec.name: bundle(spec).get(kind, 0.0) * spec.num_processes for spec in specs}
        for name, count in asked.items():
            if count > there:
                raise PlacementError(
                    f"asked for {count:g} {noun} in group {name!r}, the cluster has {there:g}; "
                    f"lower placement.{name}.{key}"
                )
        total = sum(asked.values())
        if total > there:
            parts = ", ".join(f"{name} {count:g}" for name, count in asked.items() if count)
            raise PlacementError(
                f"asked for {total:g} {noun} ({parts}), the cluster has {there:g}; every group keeps "
                "its own for the whole run: lower the numbers, or put more roles into one group"
            )


def shortage(
    specs: Sequence[GroupSpec], total: Mapping[str, float], free: Mapping[str, float], waited_s: float
) -> str:
    """Why a plan that fits an idle cluster did not get its place."""
    asked = {kind: count for kind, count in needed(specs).items() if count}
    rows = ", ".join(
        f"{count:g} {kind} of {total.get(kind, 0.0):g}, {free.get(kind, 0.0):g} of them free"
        for kind, count in asked.items()
    )
    return (
        f"no place for groups {', '.join(repr(spec.name) for spec in specs)} within {waited_s:g} s "
        f"(runtime.launch_timeout_s): asked for {rows}; somebody else holds the rest, or no single "
        "machine has enough free for one process"
    )
