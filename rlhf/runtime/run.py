"""A run: the stages of a plan, one after another, in one run directory.

    <output_dir>/<name>/
        recipe.yaml      the resolved recipe, without secrets
        metrics.jsonl    one record per step; a function of the recipe alone
        timings.jsonl    what the clock said, in the same form
        samples.jsonl    prompts, responses, rewards
        report.html      curves and samples, readable anywhere
        reward.log       what the recipe's own reward functions print
        error.log        the traceback of what stopped the run, until a later start gets through
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.checkpoint import Checkpoint, CheckpointError, check_space, find_checkpoint, is_disk_full
from rlhf.console import Console
from rlhf.data import num_steps, rows_from
from rlhf.faults import fault_point
from rlhf.models import check_own_tokens, load_tokenizer
from rlhf.recipe import rules
from rlhf.recipe.load import Plan, dump_plan
from rlhf.recipe.outputs import resolve_outputs, start_stage
from rlhf.recipe.schema import Recipe
from rlhf.runlog import flush_to_disk, write_atomically
from rlhf.runtime.assemble import (
    Datasets,
    Objects,
    evaluated_before,
    group_specs,
    load_datasets,
    make_roles,
    sampling_params,
)
from rlhf.runtime.earlier import finished_message, is_finished, run_directory
from rlhf.runtime.groups import Groups, launch
from rlhf.runtime.identity import Identity, check_identity, stage_identity
from rlhf.runtime.lock import RunInUseError, run_lock
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
ERROR_FILE = "error.log"  # in the run directory, until a later start gets through
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
        _complain(
            console,
            "interrupted; run the same command again to go on from the last checkpoint, if there is one",
        )
        return EXIT_INTERRUPTED
    except Preempted as preempted:
        _complain(console, str(preempted))
        return EXIT_PREEMPTED
    except Exception as error:  # the outermost boundary: say it, keep the traceback, exit non-zero
        text = f"{type(error).__name__}: {error}"
        if run_dir.is_dir() and not isinstance(error, RunInUseError):  # that folder is another run's
            (run_dir / ERROR_FILE).write_text(traceback.format_exc())
            text += f"\nThe traceback is in {run_dir / ERROR_FILE}"
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


@dataclass(frozen=True)
class _Run:
    """What every stage of a run shares."""

    folder: Path
    objects: Objects
    tracker: Tracker
    asked_to_stop: Callable[[], bool]


@dataclass(frozen=True)
class _Place:
    """One stage, and where it stands in the run."""

    name: str
    recipe: Recipe
    start: Recipe | None  # of the stage whose model it starts from
    folder: Path
    model_dir: Path

    @property
    def finished_file(self) -> Path:
        return self.folder / "finished.json"


def _run_stages(
    plan: Plan, run_dir: Path, objects: Objects, console: Console, asked_to_stop: Callable[[], bool]
) -> None:
    if is_finished(plan):
        console.say(finished_message(run_dir))
        return
    resolved = dump_plan(plan)
    write_atomically(run_dir / "recipe.yaml", resolved, durable=True)

    remaining, offset = _places(plan, run_dir), 0
    spans: list[tuple[_Place, int, int]] = []  # finished stages: first and last step
    while remaining and remaining[0].finished_file.is_file():
        done = remaining.pop(0)
        steps = json.loads(done.finished_file.read_text())["steps"]
        spans.append((done, offset + 1, offset + steps))
        offset += steps
    checkpoint = find_checkpoint(remaining[0].folder / "checkpoints") if remaining else None
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
    run = _Run(run_dir, objects, tracker, asked_to_stop)
    try:
        for done, first, last in spans:
            tracker.begin_stage(done.name, method=done.recipe.method, first_step=first, last_step=last)
        for place in remaining:
            if asked_to_stop():
                raise Preempted(f"stopped before stage {place.name!r}")
            offset += _run_stage(run, place, offset, checkpoint)
            checkpoint = None
        tracker.add_facts({"model": run_dir / "model"})
        tracker.close("finished")
        _write_json(run_dir / "finished.json", {"steps": offset, "model": "model"})
        (run_dir / ERROR_FILE).unlink(missing_ok=True)  # of an earlier start
    except BaseException as error:
        tracker.close(_STATUS.get(type(error), "failed"), reason=f"{type(error).__name__}: {error}")
        raise


def _run_stage(run: _Run, place: _Place, offset: int, checkpoint: Checkpoint | None) -> int:
    """Run one stage, after `offset` steps of the run, to its end and write its model. Returns its number of steps."""
    recipe, tracker = place.recipe, run.tracker
    tokenizer = run.objects.tokenizer or load_tokenizer(recipe.model, recipe.tokenizer)
    if run.objects.tokenizer is None:
        check_own_tokens(recipe.model, recipe.tokenizer, tokenizer)
    data = load_datasets(recipe, tokenizer, run.objects)
    total_steps = _num_steps(recipe, data)
    tracker.begin_stage(
        place.name, method=recipe.method, first_step=offset + 1, last_step=offset + total_steps
    )
    _say_left_out(data, tracker)
    identity = stage_identity(
        recipe,
        tokenizer=tokenizer,
        datasets=data.named,
        model=run.objects.model,
        reward_functions=run.objects.reward_functions,
    )
    if checkpoint is not None:
        for damaged in checkpoint.damaged:
            tracker.warn(f"checkpoint {damaged.path} is damaged and passed over: {damaged.reason}")
        check_identity(checkpoint, identity)
    tracker.phase("starting processes and loading models")
    updates = total_steps * rules.updates_per_step(recipe)
    with launch(group_specs(recipe, updates, run.objects), recipe.runtime) as groups:
        _describe(groups, place, tracker)
        stage = _stage_of(
            run, place, offset, total_steps, data=data, identity=identity, groups=groups, tokenizer=tokenizer
        )
        if checkpoint is not None:
            stage.resume(checkpoint)
        METHODS[recipe.method](stage)
        _export(groups, place.model_dir)
        _write_json(place.finished_file, {"stage": place.name, "steps": total_steps})
        fault_point("stage.finished")
    return total_steps


def _stage_of(
    run: _Run,
    place: _Place,
    offset: int,
    total_steps: int,
    *,
    data: Datasets,
    identity: Identity,
    groups: Groups,
    tokenizer: Any,
) -> Stage:
    """What the method's loop works with."""
    recipe, clock = place.recipe, Clock()
    sampling, eval_sampling = sampling_params(recipe, tokenizer, run.objects)
    return Stage(
        name=place.name,
        recipe=recipe,
        folder=place.folder,
        offset=offset,
        total_steps=total_steps,
        data=data.train,
        eval_sets=data.eval_sets,
        eval_pairs=data.eval_pairs,
        held_out=data.held_out,
        ptx_data=data.ptx,
        prompt_data=data.prompts,
        gold=data.gold,
        context=data.context,
        tracker=run.tracker,
        clock=clock,
        sampling=sampling,
        eval_sampling=eval_sampling,
        identity=identity,
        evaluated=evaluated_before(recipe, place.start),
        export=lambda folder: _export(groups, folder),
        should_stop=run.asked_to_stop,
        **make_roles(recipe, groups, clock, tokenizer, run.objects),
    )


# -- parts of a stage -----------------------------------------------------------------------------------------------


def _num_steps(recipe: Recipe, data: Datasets) -> int:
    """Steps of the stage. Raises ValueError where the data is too small for one, or for a step beyond
    critic.pretrain_steps."""
    trainer, rows, pretrain = recipe.trainer, len(data.train), recipe.critic.pretrain_steps
    rows_from(rows, seed=recipe.run.seed, position=0, count=trainer.prompts_per_step)
    steps = trainer.steps or num_steps(rows, epochs=trainer.epochs, rows_per_step=trainer.prompts_per_step)
    if rules.pretraining_updates(recipe) and pretrain >= steps:
        raise ValueError(
            f"critic.pretrain_steps={pretrain} of the {steps} steps that epochs={trainer.epochs} make leaves none in which "
            "the policy learns; lower it, or raise trainer.epochs"
        )
    return steps


def _say_left_out(data: Datasets, tracker: Tracker) -> None:
    for name, dataset in data.named.items():
        left_out = [f"{n} {what}" for what, n in dataset.counts.items() if n and what != "kept"]
        if left_out:
            tracker.warn(f"{name}: {len(dataset)} rows kept, {', '.join(left_out)}".replace("_", " "))


def _describe(groups: Groups, place: _Place, tracker: Tracker) -> None:
    """Say what the processes say of themselves. Raises CheckpointError where their checkpoints find no space."""
    by_group = [group.call("describe") for group in groups.values()]
    described = [facts for answers in by_group for facts in answers]
    _report_exactness(place.recipe, described, tracker)
    check_space(
        place.folder / "checkpoints",
        checkpoint_bytes=sum(answers[0]["checkpoint_bytes"] for answers in by_group),
        keep_last=place.recipe.run.keep_last,
        model_bytes=max(d["model_bytes"] for d in described),
    )


def _report_exactness(recipe: Recipe, described: Sequence[Mapping[str, Any]], tracker: Tracker) -> None:
    """Say whether engine and trainer agree bit for bit on these machines, aloud where it was asked for and is not so.

    It holds if every engine passed its probe, and trainer and engine run on the same kind of device and have the same
    form of kernels, and the engine's cache and weights are the model's own numbers. Nothing is said where there is no engine.
    """
    parameters = max(d["parameters"] for d in described)
    reports = [d["exactness"] for d in described if "exactness" in d]
    one_kind = len({(d["device"], d["kernels"]) for d in described}) == 1
    alike = one_kind and not recipe.rollout.is_rounded
    exact = recipe.runtime.deterministic and bool(reports) and alike and all(r.exact for r in reports)
    forms = sorted({d["kernels"] for d in described})
    tracker.add_facts({"parameters": f"{parameters:,}", "kernels": " and ".join(forms)})
    if ran := sorted({d["forms"] for d in described if "forms" in d}):
        tracker.add_facts({"forms of the operations": "; ".join(ran)})
    if reports:
        tracker.add_facts({"log-probs of engine and trainer bitwise equal": exact})
    if recipe.runtime.deterministic and reports and not exact and not recipe.rollout.is_rounded:
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


def _places(plan: Plan, run_dir: Path) -> list[_Place]:
    """The stages in order, with the folders of what they take from earlier ones."""
    stages, last = plan.stages, plan.stages[-1].name

    def folder_of(name: str) -> Path:
        return run_dir / "stages" / name

    starts = [start_stage(i, stages) for i in range(len(stages))]
    recipes = {
        stage.name: resolve_outputs(stage.recipe, start, folder_of)
        for stage, start in zip(stages, starts, strict=True)
    }
    return [
        _Place(
            name,
            recipe,
            start=recipes[start] if start is not None else None,
            folder=folder_of(name),
            model_dir=run_dir / "model" if name == last else folder_of(name) / "model",
        )
        for (name, recipe), start in zip(recipes.items(), starts, strict=True)
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
