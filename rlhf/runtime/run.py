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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from rlhf.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunInUseError,
    find_checkpoint,
    flush_to_disk,
    run_lock,
)
from rlhf.console import Console
from rlhf.data import PromptDataset, SftDataset, load_prompts, load_sft, num_steps, step_rows
from rlhf.faults import fault_point
from rlhf.models import context_length, generation_stop_ids, load_tokenizer
from rlhf.recipe.load import Plan, dump_plan
from rlhf.recipe.load import Stage as StagePlan
from rlhf.recipe.schema import ModelConfig, Recipe, TokenizerConfig
from rlhf.reward import Scorer
from rlhf.rollout import SamplingParams
from rlhf.runtime.groups import Groups, GroupSpec, launch
from rlhf.tracking import Tracker
from rlhf.trainers.grpo import train_grpo
from rlhf.trainers.roles import Actor, Clock, Reference, Sampler
from rlhf.trainers.sft import train_sft
from rlhf.trainers.stage import Preempted, Stage

METHODS: dict[str, Callable[[Stage], None]] = {"sft": train_sft, "grpo": train_grpo}
WORKER = "rlhf.trainers.worker:Worker"
_STATUS = {Preempted: "preempted", KeyboardInterrupt: "interrupted"}
EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED = 0, 1, 130, 143


@dataclass(frozen=True)
class Objects:
    """What the Python API hands over as objects instead of names in a recipe."""

    model: Any = None
    tokenizer: Any = None
    train_rows: Sequence[Mapping[str, Any]] | None = None
    eval_rows: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    reward_functions: Mapping[str, Callable] = field(default_factory=dict)


def run_plan(plan: Plan, *, fresh: bool = False) -> int:
    """Run a plan from the command line. Returns a process exit code: 0 finished (now or before), 1 failed, 130
    interrupted, 143 preempted (SIGTERM; the state is saved).
    """
    console, run_dir = Console(), _run_dir(plan)
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


def train_plan(plan: Plan, *, objects: Objects | None = None, fresh: bool = False, console: Console | None = None) -> Path:
    """Run every stage that is not finished and return the folder of the last stage's model.

    With `fresh`, an earlier run of this name is moved aside first, never deleted. Raises whatever stopped the run, after
    its processes are gone; `Preempted` after SIGTERM.
    """
    run_dir, console = _run_dir(plan), console or Console()
    if fresh and run_dir.exists():
        with run_lock(run_dir):  # never from under a run that is alive
            move_aside(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the run directory {run_dir} cannot be made: {error.strerror}; set run.output_dir") from error
    with run_lock(run_dir), _SigtermFlag() as asked_to_stop:
        _run_stages(plan, run_dir, objects or Objects(), console, asked_to_stop)
    return run_dir / "model"


def _complain(console: Console, text: str) -> None:
    console.stop()
    print(text, file=sys.stderr, flush=True)


def _run_dir(plan: Plan) -> Path:
    run = plan.stages[0].recipe.run
    return Path(run.output_dir) / run.name


def _run_stages(
    plan: Plan, run_dir: Path, objects: Objects, console: Console, asked_to_stop: Callable[[], bool]
) -> None:
    resolved = dump_plan(plan)
    if any(run_dir.glob("stages/*/*")):  # before the first checkpoint nothing binds the run to its recipe
        _check_same_recipe(run_dir / "recipe.yaml", resolved)
    if (run_dir / "finished.json").is_file():
        console.say(f"{run_dir} is already finished; --fresh moves it aside and runs again")
        return
    _write_durably(run_dir / "recipe.yaml", resolved)

    remaining, offset = _stages_in_order(plan, run_dir), 0
    spans: list[tuple[StagePlan, int, int]] = []  # finished stages: first and last step
    while remaining and (run_dir / "stages" / remaining[0].name / "finished.json").is_file():
        done = remaining.pop(0)
        steps = json.loads((run_dir / "stages" / done.name / "finished.json").read_text())["steps"]
        spans.append((done, offset + 1, offset + steps))
        offset += steps
    checkpoint = find_checkpoint(run_dir / "stages" / remaining[0].name / "checkpoints") if remaining else None
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
            offset += _run_stage(stage_plan, folder, model_dir, offset, checkpoint, tracker, objects, asked_to_stop)
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
) -> int:
    """Run one stage to its end and write its model. Returns its number of steps."""
    recipe, trainer = plan.recipe, plan.recipe.trainer
    tokenizer = objects.tokenizer or load_tokenizer(recipe.model, recipe.tokenizer)
    data, eval_sets = _load_data(recipe, tokenizer, objects)
    scorer = Scorer(recipe.reward, functions=objects.reward_functions) if recipe.reward else None
    sampling, eval_sampling = _sampling(recipe, tokenizer, objects)
    total_steps = trainer.steps or num_steps(len(data), epochs=trainer.epochs, rows_per_step=trainer.prompts_per_step)
    updates = total_steps * trainer.minibatches_per_step * trainer.passes_per_step
    tracker.begin_stage(
        plan.name, method=recipe.method, first_step=offset + 1, last_step=offset + total_steps
    )
    for name, dataset in {"training set": data, **eval_sets}.items():
        left_out = [f"{n} {what}" for what, n in dataset.counts.items() if n and what != "kept"]
        if left_out:
            tracker.warn(f"{name}: {len(dataset)} rows kept, {', '.join(left_out)}".replace("_", " "))
    step_rows(len(data), seed=recipe.run.seed, step=0, rows_per_step=trainer.prompts_per_step)  # enough for a step?
    tracker.phase("starting processes and loading models")
    with launch(_specs(recipe, updates, objects), recipe.runtime) as groups:
        clock, micro = Clock(), trainer.micro_batch_tokens
        _report_exactness(recipe, [facts for group in groups.values() for facts in group.call("describe")], tracker)
        stage = Stage(
            name=plan.name,
            recipe=recipe,
            folder=folder,
            offset=offset,
            total_steps=total_steps,
            data=data,
            eval_sets=eval_sets,
            actor=Actor(groups.for_role("actor"), clock, micro_batch_tokens=micro),
            reference=(
                Reference(groups.for_role("reference"), clock, micro_batch_tokens=micro)
                if "reference" in recipe.roles
                else None
            ),
            sampler=_sampler(recipe, groups, clock, tokenizer),
            scorer=scorer,
            tracker=tracker,
            clock=clock,
            sampling=sampling,
            eval_sampling=eval_sampling,
            fingerprint={"data": data.fingerprint},
            should_stop=asked_to_stop,
        )
        if checkpoint is not None:
            for damaged in checkpoint.damaged:
                tracker.warn(f"checkpoint {damaged.path} is damaged and passed over: {damaged.reason}")
            _check_fingerprint(checkpoint, stage.fingerprint)
            stage.resume(checkpoint)
        METHODS[recipe.method](stage)
        _export(groups, model_dir)
        _write_json(folder / "finished.json", {"stage": plan.name, "steps": total_steps})
        fault_point("stage.finished")
    return total_steps


# -- parts of a stage -----------------------------------------------------------------------------------------------


def _load_data(recipe: Recipe, tokenizer: Any, objects: Objects) -> tuple[PromptDataset | SftDataset, dict[str, PromptDataset]]:
    """The training set and the evaluation sets, every row checked."""
    if objects.model is not None:
        context = objects.model.config.get_text_config().max_position_embeddings
    else:
        context = context_length(recipe.model)
    response = recipe.evaluation.max_response_tokens or recipe.rollout.max_response_tokens
    evals = {
        name: load_prompts(
            config,
            tokenizer,
            name=name,
            max_context=_room(context, response, "evaluation" if recipe.evaluation.max_response_tokens else "rollout"),
            rows=objects.eval_rows.get(name),
        )
        for name, config in recipe.evaluation.sets.items()
    }
    if recipe.method == "sft":
        data = load_sft(recipe.data, tokenizer, name="train", max_context=context, rows=objects.train_rows)
        return data, evals
    room = _room(context, recipe.rollout.max_response_tokens, "rollout")
    return load_prompts(recipe.data, tokenizer, name="train", max_context=room, rows=objects.train_rows), evals


def _room(context: int, response_tokens: int, section: str) -> int:
    if response_tokens >= context:
        raise ValueError(
            f"{section}.max_response_tokens={response_tokens} leaves no room for a prompt in the model's context of "
            f"{context} tokens; lower it"
        )
    return context - response_tokens


def _sampling(recipe: Recipe, tokenizer: Any, objects: Objects) -> tuple[SamplingParams, SamplingParams]:
    """Sampling for training and for evaluation, with the stop texts of the recipe as token ids."""
    r, e = recipe.rollout, recipe.evaluation
    stop_ids = [tokenizer.eos_token_id, *generation_stop_ids(recipe.model, objects.model)]
    for text in r.stop:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"rollout.stop: {text!r} is {len(ids)} tokens; a stop must be one token of the vocabulary")
        stop_ids.append(ids[0])
    unique = tuple(dict.fromkeys(stop_ids))
    train = SamplingParams(
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        max_tokens=r.max_response_tokens,
        stop_ids=unique,
    )
    evaluation = SamplingParams(
        temperature=e.temperature,
        max_tokens=e.max_response_tokens or r.max_response_tokens,
        stop_ids=unique,
    )
    return train, evaluation


def _specs(recipe: Recipe, updates: int, objects: Objects) -> list[GroupSpec]:
    groups = recipe.groups
    if not recipe.placement and torch.cuda.is_available():  # one group with every role, on the GPU if there is one
        groups = {name: group.model_copy(update={"gpus": 1}) for name, group in groups.items()}
    processes = sum(g.num_processes for g in groups.values()) if recipe.runtime.backend == "ray" else 1
    threads = recipe.runtime.threads or max(1, (os.cpu_count() or 1) // processes)
    return [
        GroupSpec(
            name=name,
            roles=tuple(group.roles),
            num_processes=group.num_processes,
            gpus=group.gpus,
            worker=WORKER,
            kwargs={
                "recipe": recipe,
                "roles": tuple(group.roles),
                "threads": threads,
                "total_updates": updates,
                "model": objects.model,
                "tokenizer": objects.tokenizer,
            },
            threads=threads,
        )
        for name, group in groups.items()
    ]


def _sampler(recipe: Recipe, groups: Groups, clock: Clock, tokenizer: Any) -> Sampler | None:
    if "rollout" not in recipe.roles:
        return None

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return Sampler(groups.for_role("rollout"), clock, seed=recipe.run.seed, decode=decode)


def _report_exactness(recipe: Recipe, described: Sequence[Mapping[str, Any]], tracker: Tracker) -> None:
    """Say whether engine and trainer agree bit for bit on these machines, aloud where it was asked for and is not so.

    It holds if every engine passed its probe, and trainer and engine run on the same kind of device.
    """
    parameters = max(d["parameters"] for d in described)
    reports = [d["exactness"] for d in described if "exactness" in d]
    one_kind = len({d["device"] for d in described}) == 1
    exact = recipe.runtime.deterministic and bool(reports) and one_kind and all(r.exact for r in reports)
    tracker.add_facts({"parameters": f"{parameters:,}", "log-probs of engine and trainer bitwise equal": exact})
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
    groups.for_role("actor").call("export", str(partial))
    fault_point("stage.export")
    for file in [*partial.rglob("*"), partial]:
        flush_to_disk(file)
    shutil.rmtree(model_dir, ignore_errors=True)
    partial.rename(model_dir)
    flush_to_disk(model_dir.parent)


# -- the run directory ----------------------------------------------------------------------------------------------


def _stages_in_order(plan: Plan, run_dir: Path) -> list[StagePlan]:
    """The stages, each starting from the model of the one before unless it names a model of its own."""
    stages = list(plan.stages)
    for i in range(1, len(stages)):
        before, here = plan.stages[i - 1], plan.stages[i]
        if (here.recipe.model.path, here.recipe.model.build) != (before.recipe.model.path, before.recipe.model.build):
            continue
        folder = str(run_dir / "stages" / before.name / "model")
        model = ModelConfig(**(here.recipe.model.model_dump() | {"path": folder, "build": None, "trust_code": None}))
        recipe = here.recipe.model_copy(update={"model": model, "tokenizer": TokenizerConfig()})
        stages[i] = StagePlan(here.name, recipe)
    return stages


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
    "trainer.micro_batch_tokens",
    "trainer.zero_stage",
    "trainer.offload_optimizer",
)


def _check_same_recipe(path: Path, resolved: str) -> None:
    changed = changed_keys(path.read_text(), resolved) if path.is_file() else []
    if changed:
        raise ValueError(
            f"{path.parent} holds a run of another recipe ({'; '.join(changed)}); choose another run.name, or --fresh to "
            "move that run aside"
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


def _check_fingerprint(checkpoint: Any, fingerprint: Mapping[str, str]) -> None:
    for name, now in fingerprint.items():
        before = checkpoint.meta["fingerprint"].get(name)
        if before != now:
            raise CheckpointError(
                f"the {name} changed since {checkpoint.path} was saved (fingerprint {before} then, {now} now); restore it, or "
                "start a new run under another run.name"
            )


def move_aside(run_dir: Path) -> Path | None:
    """Rename an existing run directory to <name>.old-<n>. Returns its new place, or None if there was none."""
    if not run_dir.exists():
        return None
    n = 1
    while (target := run_dir.with_name(f"{run_dir.name}.old-{n}")).exists():
        n += 1
    return run_dir.rename(target)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_durably(path, json.dumps(value, indent=1))


def _write_durably(path: Path, text: str) -> None:
    """Whole and on the disk, or not there at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
    flush_to_disk(partial)
    partial.rename(path)
    flush_to_disk(path.parent)


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
