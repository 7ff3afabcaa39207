"""What every method learns: runs the recipes of recipes/arithmetic and tells each stage's numbers before and after.

A row of the table is one stage and one held-out set: sampled accuracy (pass@1) of a policy, accuracy on held-out pairs
of a reward model, and on held-out steps of a process reward model, where "before" is what always saying yes reaches.
Intervals are Wilson's, 95 %. Seconds are those of the stage's steps and evaluations, without starting and exporting.

    python benchmarks/methods.py [NAMES ...] [--work DIR] [--out benchmarks/results]

With --work a run that is finished there is read and not repeated. Writes files only with --out: methods-DATE.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.running import ROOT, machine, read, train
from rlhf.recipe.load import Plan, load_plan
from rlhf.recipe.outputs import start_stage
from rlhf.reward_loss import accuracy_interval

RECIPES = ROOT / "recipes" / "arithmetic"

Record = Mapping[str, Any]
Row = dict[str, Any]


def run(name: str, work: Path) -> tuple[Plan, Path]:
    """Train a recipe in `work`; its plan and its run directory."""
    file = RECIPES / f"{name}.yaml"
    train(file, work, f"run.name={name}")
    return load_plan(file), work / name


def rows(name: str, plan: Plan, run_dir: Path) -> Iterator[Row]:
    """The table's rows of one recipe."""
    metrics, timings = (read(run_dir / f"{kind}.jsonl") for kind in ("metrics", "timings"))
    for i, stage in enumerate(plan.stages):
        own = [r for r in metrics if r["stage"] == stage.name]
        trained = [r for r in own if "robust/skipped_steps" in r]
        seconds = sum(r["time/step_s"] for r in timings if r["stage"] == stage.name)
        about = {"recipe": name, "stage": stage.name, "method": stage.recipe.method, "steps": len(trained)}
        about |= {"seconds": round(seconds)}
        start = start_stage(i, plan.stages)
        earlier = [r for r in metrics if r["stage"] == start]
        for held_out, count in held_out_sets(stage.recipe).items():
            found = [accuracy(r, held_out, count) for r in own]
            known = [a for a in (accuracy(r, held_out, count) for r in earlier) if a is not None][-1:]
            known += [a for a in found if a is not None]
            yield about | {"set": held_out, "before": known[0], "after": known[-1]}
        for held_out, data in stage.recipe.evaluation.held_out.items():
            yield about | {"set": held_out, **verdicts(own, held_out, data.task_args)}
        if not stage.recipe.evaluation.held_out and not held_out_sets(stage.recipe):
            yield about | {"set": None, "before": None, "after": None}


def held_out_sets(recipe: Any) -> dict[str, int]:
    """Answers, or pairs, of each set."""
    answers = recipe.evaluation.samples
    sets = {name: data.task_args["count"] * answers for name, data in recipe.evaluation.sets.items()}
    return sets | {name: data.task_args["count"] for name, data in recipe.evaluation.pairs.items()}


def accuracy(record: Record, held_out: str, count: int) -> list[float] | None:
    """[accuracy, low, high] if the record has an evaluation of the set."""
    for metric in ("pass@1", "accuracy"):
        value = record.get(f"eval/{held_out}/{metric}")
        if value is not None:
            return with_interval(value, count)
    return None


def verdicts(own: Sequence[Record], held_out: str, task_args: Mapping[str, int]) -> Row:
    """Of a process reward model: what always saying yes reaches, and what it reaches after its last step."""
    last = next(r for r in reversed(own) if f"eval/{held_out}/label_mean" in r)
    steps = task_args["count"] * (task_args["terms"] - 1)
    always_yes, right = (last[f"eval/{held_out}/{name}"] for name in ("label_mean", "accuracy"))
    return {"before": with_interval(always_yes, steps), "after": with_interval(right, steps)}


def with_interval(value: float, count: int) -> list[float]:
    return [round(x, 4) for x in (value, *accuracy_interval(value * count, count))]


def table(found: Sequence[Row]) -> str:
    head = ("recipe", "stage", "method", "held out", "before %", "after % [95 %]", "steps", "s")
    body = [
        (
            r["recipe"],
            r["stage"],
            r["method"],
            r["set"] or "",
            percent(r["before"]),
            percent(r["after"], True),
        )
        + (str(r["steps"]), str(r["seconds"]))
        for r in found
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def percent(value: Sequence[float] | None, interval: bool = False) -> str:
    if value is None:
        return ""
    shown = [f"{100 * x:.1f}" for x in value]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if interval else shown[0]


def main() -> None:
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix="methods-"))).resolve()
    found = [row for name in args.names or known for row in rows(name, *run(name, work))]
    report = {"benchmark": "methods", "date": time.strftime("%Y-%m-%d"), "rows": found, "machine": machine()}
    print(table(found))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"methods-{report['date']}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
