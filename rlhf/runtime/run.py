"""A run: the stages of a plan, one after another, in one run directory.

    <output_dir>/<name>/
        recipe.yaml      the resolved recipe, without secrets
        metrics.jsonl    one record per step; a function of the recipe alone
        timings.jsonl    what the clock said, in the same form
        samples.jsonl    prompts, responses, rewards
        report.html      curves and samples, readable anywhere
        stages/<stage>/  checkpoints, and when the stage is over its model and finished.json
        model/           the last stage's model in Hugging Face's format

Running the same plan again goes on where the last checkpoint stands; a finished run says so and does nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunInUseError,
    check_space,
    find_checkpoint,
    is_disk_full,
    run_lock,
)
from rlhf.console import Console
from rlhf.data import num_steps, rows_from
from rlhf.faults import fault_point
from rlhf.models import load_tokenizer
from rlhf.recipe.load import Plan, dump_plan
from rlhf.recipe.load import Stage as StagePlan
from rlhf.recipe.outputs import MODEL_SECTIONS, resolve_outputs, start_stage
from rlhf.recipe.schema import ModelConfig, Recipe
from rlhf.runlog import flush_to_disk, write_atomically
from rlhf.runtime.assemble import Objects, group_specs, load_datasets, make_roles, sampling_params
from rlhf.runtime.earlier import finished_message, is_finished, run_directory
from rlhf.runtime.groups import Groups, launch
from rlhf.runtime.identity import check_identity, model_identity, tokenizer_identity
from rlhf.tracking import Tracker
from rlhf.trainers.distill import train_distill
from rlhf.trainers.dpo import train_dpo
from rlhf.trainers.grpo import train_grpo
from rlhf.trainers.kto import train_kto
from rlhf.trainers.online_dpo import train_online_dpo
from rlhf.trainers.ppo import train_ppo
from rlhf.trainers.rejection import train_rejection
from rlhf.trainers.rm import train_prm, train_rm
from rlhf.trainers.roles import Clock
from rlhf.trainers.sft import train_sft
from rlhf.trainers.stage import Preempted, Stage

METHODS: dict[str, Callable[[Stage], None]] = {
    "sft": train_sft,
    "rm": train_rm,
    "prm": train_prm,
    "ppo": train_ppo,
    "grpo": train_grpo,
    "dpo": train_dpo,
    "kto": train_kto,
    "online_dpo": train_online_dpo,
    "rejection": train_rejection,
    "distill": train_distill,
}
_STATUS = {Preempted: "preempted", KeyboardInterrupt: "interrupted"}
EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED = 0, 1, 130, 143


def run_plan(plan: Plan, *, fresh: bool = False) -> int:
    """Run a plan from the command line. Returns a process exit code: 0 finished (now or before), 1 failed, 130
    interrupted, 143 preempted (SIGTERM; the state is saved).
    """
    console, run_dir = Console(), run_directory(plan)
    try:
        train_plan(plan, fresh=fresh, console=console)
        return EXIT_OK
    except KeyboardInterrupt:
        _complain(console, "interrupted; run the same command again to go on from the last checkpoint")
        return EXIT_INTERRUPTED
    except Preempted as preempted:
        _complain(console, str(preempted))
        return EXIT_PREEMPTED
    except Exception as error:  # the outermost boundary: say it, keep the traceback, exit non-zero
        text = f"{type(error).__name__}: {error}"
        if run_dir.is_dir() and not isinstance(error, RunInUseError):  # that folder is another run's
            (run_dir / "error.log").write_text(traceback.format_exc())
            text += f"\nThe traceback is in {run_dir / 'error.log'}"
        _complain(console, text)
        if os.environ.get("RLHF_DEBUG"):
            traceback.print_exc()
        return EXIT_ERROR


def train_plan(
    plan: Plan, *, objects: Objects | None = None, fresh: bool = False, console: Console | None = None
) -> Path:
    """Run every stage that is not finished and return the folder of the last stage's model.

    With `fresh`, an earlier run of this name is moved aside first, never deleted. Raises whatever stopped the run, after
    its processes are gone; `Preempted` after SIGTERM.
    """
    run_dir, console = run_directory(plan), console or Console()
    if fresh and run_dir.exists():
        with run_lock(run_dir):  # never from under a run that is alive
            move_aside(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the run directory {run_dir} cannot be made: {error.strerror}; set run.output_dir"
        ) from error
    with run_lock(run_dir), _SigtermFlag() as asked_to_stop:
        _run_stages(plan, run_dir, objects or Objects(), console, asked_to_stop)
    return run_dir / "model"


def _complain(console: Console, text: str) -> None:
    console.stop()
    print(text, file=sys.stderr, flush=True)


def _run_stages(
    plan: Plan, run_dir: Path, objects: Objects, console: Console, asked_to_stop: Callable[[], bool]
) -> None:
    if is_finished(plan):
        console.say(finished_message(run_dir))
        return
    resolved = dump_plan(plan)
    write_atomically(run_dir / "recipe.yaml", resolved, durable=True)

    remaining, offset = _stages_in_order(plan, run_dir), 0
    spans: list[tuple[StagePlan, int, int]] = []  # finished stages: first and last step
    while remaining and (run_dir / "stages" / remaining[0].name / "finished.json").is_file():
        done = remaining.pop(0)
        steps = json.loads((run_dir / "stages" / done.name / "finished.json").read_text())["steps"]
        spans.append((done, offset + 1, offset + steps))
        offset += steps
    checkpoint = (
        find_checkpoint(run_dir / "stages" / remaining[0].name / "checkpoints") if remaining else None
    )
    reached = offset + (checkpoint.meta["progress"]["step"] if checkpoint else 0)
    tracker = Tracker(
        run_dir,
        plan.stages[0].recipe.tracking,
        run_name=run_dir.name,
        resolved_recipe=yaml.safe_load(resolved),
        resume_step=reached or None,
        console=console,
        recipe_source=plan.source,
    )
    try:
        for done, first, last in spans:
            tracker.begin_stage(done.name, method=done.recipe.method, first_step=first, last_step=last)
        for stage_plan in remaining:
            if asked_to_stop():
                raise Preempted(f"stopped before stage {stage_plan.name!r}")
            folder = run_dir / "stages" / stage_plan.name
            model_dir = run_dir / "model" if stage_plan is remaining[-1] else folder / "model"
            goes_on = (
                start_stage([s.name for s in plan.stages].index(stage_plan.name), plan.stages) is not None
            )
            offset += _run_stage(
                stage_plan, folder, model_dir, offset, checkpoint, tracker, objects, asked_to_stop, goes_on
            )
            checkpoint = None
        tracker.add_facts({"model": run_dir / "model"})
        tracker.close("finished")
        _write_json(run_dir / "finished.json", {"steps": offset, "model": "model"})
    except BaseException as error:
        tracker.close(_STATUS.get(type(error), "failed"), reason=f"{type(error).__name__}: {error}")
        raise


def _run_stage(
    plan: StagePlan,
    folder: Path,
    model_dir: Path,
    offset: int,
    checkpoint: Checkpoint | None,
    tracker: Tracker,
    objects: Objects,
    asked_to_stop: Callable[[], bool],
    goes_on: bool,
) -> int:
    """Run one stage to its end and write its model. Returns its number of steps. `goes_on`: it starts from the model of
    an earlier stage."""
    recipe, trainer = plan.recipe, plan.recipe.trainer
    tokenizer = objects.tokenizer or load_tokenizer(recipe.model, recipe.tokenizer)
    data = load_datasets(recipe, tokenizer, objects)
    sampling, eval_sampling = sampling_params(recipe, tokenizer, objects)
    rows_per_step = trainer.prompts_per_step
    total_steps = trainer.steps or num_steps(
        len(data.train), epochs=trainer.epochs, rows_per_step=rows_per_step
    )
    updates = total_steps * trainer.minibatches_per_step * trainer.passes_per_step
    tracker.begin_stage(
        plan.name, method=recipe.method, first_step=offset + 1, last_step=offset + total_steps
    )
    for name, dataset in data.named.items():
        left_out = [f"{n} {what}" for what, n in dataset.counts.items() if n and what != "kept"]
        if left_out:
            tracker.warn(f"{name}: {len(dataset)} rows kept, {', '.join(left_out)}".replace("_", " "))
    rows_from(len(data.train), seed=recipe.run.seed, position=0, count=rows_per_step)  # enough for a step?
    identity = {
        "model": model_identity(recipe.model, seed=recipe.run.seed, model=objects.model),
        **_others_identity(recipe),
        "tokenizer": tokenizer_identity(tokenizer),
        **{name: {"rows": dataset.fingerprint} for name, dataset in data.named.items()},
    }
    if checkpoint is not None:
        for damaged in checkpoint.damaged:
            tracker.warn(f"checkpoint {damaged.path} is damaged and passed over: {damaged.reason}")
        check_identity(checkpoint, identity)
    tracker.phase("starting processes and loading models")
    with launch(group_specs(recipe, updates, objects), recipe.runtime) as groups:
        clock = Clock()
        by_group = [group.call("describe") for group in groups.values()]
        described = [facts for answers in by_group for facts in answers]
        _report_exactness(recipe, described, tracker)
        check_space(
            folder / "checkpoints",
            checkpoint_bytes=sum(answers[0]["checkpoint_bytes"] for answers in by_group),
            keep_last=recipe.run.keep_last,
            model_bytes=max(d["model_bytes"] for d in described),
        )
        stage = Stage(
            name=plan.name,
            recipe=recipe,
            folder=folder,
            offset=offset,
            total_steps=total_steps,
            data=data.train,
            eval_sets=data.eval_sets,
            eval_pairs=data.eval_pairs,
            ptx_data=data.ptx,
            prompt_data=data.prompts,
            gold=data.gold,
            tracker=tracker,
            clock=clock,
            sampling=sampling,
            eval_sampling=eval_sampling,
            identity=identity,
            evaluated=goes_on,
            export=lambda folder: _export(groups, folder),
            should_stop=asked_to_stop,
            **make_roles(recipe, groups, clock, tokenizer, objects),
        )
        if checkpoint is not None:
            stage.resume(checkpoint)
        METHODS[recipe.method](stage)
        _export(groups, model_dir)
        _write_json(folder / "finished.json", {"stage": plan.name, "steps": total_steps})
        fault_point("stage.finished")
    return total_steps


def _others_identity(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Of the models beside the one that is trained."""
    sections = {name: getattr(recipe, name) for name in MODEL_SECTIONS if name != "model"}
    return {
        name.replace("_", " "): model_identity(
            ModelConfig(path=section.path), seed=recipe.run.seed, model=None
        )
        for name, section in sections.items()
        if section is not None and section.path is not None
    }


# -- parts of a stage -----------------------------------------------------------------------------------------------


def _report_exactness(recipe: Recipe, described: Sequence[Mapping[str, Any]], tracker: Tracker) -> None:
    """Say whether engine and trainer agree bit for bit on these machines, aloud where it was asked for and is not so.

    It holds if every engine passed its probe, and trainer and engine run on the same kind of device.
    """
    parameters = max(d["parameters"] for d in described)
    reports = [d["exactness"] for d in described if "exactness" in d]
    one_kind = len({d["device"] for d in described}) == 1
    exact = recipe.runtime.deterministic and bool(reports) and one_kind and all(r.exact for r in reports)
    tracker.add_facts(
        {"parameters": f"{parameters:,}", "log-probs of engine and trainer bitwise equal": exact}
    )
    if recipe.runtime.deterministic and reports and not exact:
        worst = max(r.max_abs_diff for r in reports)
        tracker.warn(
            f"log-probs of engine and trainer are not bitwise equal here (largest difference in the probe {worst:.2e} "
            "nats); mismatch/* says by how much in every step"
        )


def _export(groups: Groups, model_dir: Path) -> None:
    """Write the model beside its place and rename it, so that a folder by that name is always whole."""
    partial = model_dir.with_name(model_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        groups.for_role("actor").call("export", str(partial))
    except Exception as error:
        if not is_disk_full(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(model_dir.parent).free
        raise CheckpointError(
            f"no space for the model in {model_dir.parent}: {free / 1e9:.3f} GB are free. The training is done and saved: "
            "free some space and run the same command again"
        ) from error
    fault_point("stage.export")
    for file in [*partial.rglob("*"), partial]:
        flush_to_disk(file)
    shutil.rmtree(model_dir, ignore_errors=True)
    partial.rename(model_dir)
    flush_to_disk(model_dir.parent)


# -- the run directory ----------------------------------------------------------------------------------------------


def _stages_in_order(plan: Plan, run_dir: Path) -> list[StagePlan]:
    """The stages, with the folders of what they take from earlier ones."""
    stages = plan.stages

    def folder_of(name: str) -> Path:
        return run_dir / "stages" / name

    return [
        StagePlan(stage.name, resolve_outputs(stage.recipe, start_stage(i, stages), folder_of))
        for i, stage in enumerate(stages)
    ]


def move_aside(run_dir: Path) -> Path | None:
    """Rename an existing run directory to <name>.old-<n>. Returns its new place, or None if there was none."""
    if not run_dir.exists():
        return None
    n = 1
    while (target := run_dir.with_name(f"{run_dir.name}.old-{n}")).exists():
        n += 1
    return run_dir.rename(target)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1), durable=True)


class _SigtermFlag:
    """Turns SIGTERM into a question that the loop asks between steps."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Callable[[], bool]:
        self._main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return lambda: self._asked

    def _note(self, *_: Any) -> None:
        self._asked = True

    def __exit__(self, *_: Any) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)
