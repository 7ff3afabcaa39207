"""The record of a run: one line per step on disk, and sinks that may fail (terminal, report.html, wandb).

Here: `Tracker`, which the runtime feeds and closes. Not here: the record files themselves (`rlhf.runlog`),
the page (`rlhf.report`), the terminal (`rlhf.console`), the thresholds (`rlhf.metric_rules`).

metrics.jsonl is the source of truth and holds only values that are a function of the recipe, so that a run
that was killed and resumed ends with the same bytes as one that was not. What a clock or the machine decides
goes to timings.jsonl.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import rlhf
from rlhf.charts import format_value, is_share
from rlhf.console import Console
from rlhf.faults import fault_point
from rlhf.metric_rules import MetricWatch
from rlhf.recipe.secrets import HIDDEN, hides
from rlhf.report import build_report, heldout_changes, trend_of
from rlhf.runlog import (
    METRICS_FILE,
    REPORT_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    TIMINGS_FILE,
    RecordFile,
    decode_metrics,
    encode_record,
    write_atomically,
)

if TYPE_CHECKING:
    from rlhf.recipe.schema import TrackingConfig
    from rlhf.records import Rollout

Status = Literal["finished", "failed", "interrupted", "preempted"]

MEASURED_AREAS = ("time", "perf", "cache")
MEASURED = (
    "rollout/preempted",
    "rollout/forward_passes",
    "rollout/drafted_tokens",
    "rollout/accepted_tokens",
)

_PACKAGES = ("torch", "transformers", "deepspeed", "ray", "peft", "datasets")
_REASONS_SHOWN = 5  # distinct reasons of masked responses named for one step
_STAGES_IN_A_LINE = 3  # of the summary's milestones; more stages are a table
_START = "(start)"  # its row for the first evaluation
_REPORT_SHARE = 0.02  # of the run's time may go into rewriting the report


def is_measured(name: str) -> bool:
    """Whether a metric depends on the clock, the machine or a restart, and so has no place in metrics.jsonl."""
    return name.split("/", 1)[0] in MEASURED_AREAS or name in MEASURED


@dataclass
class _Recurring:
    """Something that may be said at every step."""

    last_said: int  # step
    since: int = 0  # times that it came since then


class Tracker:
    """Writes the record of one run. `log` each step before its checkpoint is saved: on resume the files are
    cut to the steps up to `resume_step` (None: to nothing), and every later step must come again.

    A step whose record survived the cut and comes again (an evaluation before the first step of a stage) is
    compared with the kept one and not written twice.

    Raises OSError if a record cannot be written. The terminal, the report and wandb never stop a run: what
    they fail to take is counted in run.json, and said once.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        *,
        run_name: str,
        resolved_recipe: Mapping[str, Any],
        resume_step: int | None,
        console: Console,
        recipe_source: str | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._console = console
        self._resume_step = resume_step
        self._metrics, self._timings, self._samples = (
            RecordFile(self.run_dir / name, keep_through=resume_step)
            for name in (METRICS_FILE, TIMINGS_FILE, SAMPLES_FILE)
        )
        self._last_step = resume_step or 0
        self._kept = {
            r["stage"]: r for r in self._metrics.kept if r["step"] == resume_step
        }  # of the last step
        self._logged: set[str] = set()  # stages that this process has logged the last step of
        self._kept_samples = {(r["step"], r["stage"]) for r in self._samples.kept if r["step"] == resume_step}
        self._watch = MetricWatch()
        for record in [*self._metrics.kept, *self._timings.kept]:
            self._watch.update(_numbers(decode_metrics(record)))
        self._headlines = [_headline_values(decode_metrics(r)) for r in self._metrics.kept]
        self._shown_stages: set[str] = set()  # stages of which a table of samples was shown
        self._recurring: dict[str, _Recurring] = {}
        self._report_cost_s, self._report_done = 0.0, time.monotonic()
        recipe = without_secrets(resolved_recipe, os.environ)
        self._run = self._open_run(run_name, recipe, recipe_source)
        self._guard("terminal", self._say_hello)
        self._wandb: _Wandb | None = None
        if config.wandb != "off":
            self._guard("wandb", lambda: self._start_wandb(recipe))
        self._save_run()

    # --- what the runtime calls

    def begin_stage(self, name: str, *, method: str, first_step: int, last_step: int) -> None:
        """Announce the steps first_step..last_step, counted over the whole run. Call it for every stage in
        order, those that a resumed run has behind it too."""
        known = [s for s in self._run["stages"] if s["name"] != name]
        stage = {"name": name, "method": method, "first_step": first_step, "last_step": last_step}
        self._run["stages"] = sorted([*known, stage], key=lambda s: s["first_step"])
        self._save_run()
        done = self._resume_step or 0
        self._guard(
            "terminal",
            lambda: self._console.begin_stage(
                name, first_step=first_step, last_step=last_step, done_step=min(done, last_step)
            ),
        )

    def log(self, step: int, stage: str, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Record one step: everything that happened at it, its evaluations included (`eval/<set>/<metric>`).
        Step 0 is the state before training. Numbers only; measured metrics are moved to the timings by name.
        Raises ValueError for a step that goes back or comes twice, TypeError for a value that is no number.
        """
        numbers = _as_numbers(metrics)
        exact = {k: v for k, v in numbers.items() if not is_measured(k)}
        measured = {**{k: v for k, v in numbers.items() if is_measured(k)}, **_as_numbers(timings)}
        record = {"step": step, "stage": stage, **dict(sorted(exact.items()))}
        if self._is_new(record):
            self._metrics.append([record])
            self._timings.append([{"step": step, "stage": stage, **dict(sorted(measured.items()))}])
            fault_point("track")
            self._metrics.flush()
            self._timings.flush()
            self._headlines.append(_headline_values(record))
            if self._wandb is not None:
                self._guard("wandb", lambda: self._wandb.log({"step": step, **exact, **measured}))
        for warning in self._watch.update({**exact, **measured}):
            self._guard("terminal", lambda text=warning: self._console.warn(f"step {step}: {text}"))
        self._guard("terminal", lambda: self._console.step(step, stage, exact))
        if step % self._config.report_every == 0 or any(k.startswith("eval/") for k in exact):
            self._write_report(at_once=step == 0)

    def samples(
        self, step: int, stage: str, rollouts: Sequence[Rollout], *, masked: Sequence[str | None]
    ) -> None:
        """Record some of one step's responses, picked evenly from the given order; show a few every
        report_every steps. `masked` says of each response why it is left out of the loss, None if it is not;
        each distinct reason is said, with its count (`recurring`)."""
        chosen = _spread(list(zip(rollouts, masked, strict=True)), self._config.samples_per_step)
        if (step, stage) not in self._kept_samples:
            self._samples.append([_sample_record(step, stage, r, why) for r, why in chosen])
            self._samples.flush()
        self._say_masked(step, rollouts, masked)
        shown = _spread(rollouts, self._config.console_samples)
        is_due = stage not in self._shown_stages or step % self._config.report_every == 0
        if shown and is_due:
            self._shown_stages.add(stage)
            self._guard("terminal", lambda: self._console.samples(step, stage, shown))

    def add_facts(self, facts: Mapping[str, object]) -> None:
        """Facts about the run for people (device, processes, exactness), shown in the report."""
        words = {True: "yes", False: "no"}
        self._run["facts"].update({k: words[v] if isinstance(v, bool) else str(v) for k, v in facts.items()})
        self._save_run()

    def warn(self, text: str) -> None:
        """Say something that is no metric, in the terminal and, once, in the report."""
        if text not in self._run["warnings"]:  # a resumed run comes by the same places again
            self._run["warnings"].append(text)
        self._guard("terminal", lambda: self._console.warn(text))
        self._save_run()

    def recurring(self, step: int, text: str, *, kind: str | None = None) -> None:
        """Say something that may come at every step: a warning the first time, from then on a line in the
        terminal at most every report_every steps. `kind` tells two things apart where the text is not the same.
        """
        kind = text if kind is None else kind
        known = self._recurring.get(kind)
        if known is None:
            self._recurring[kind] = _Recurring(step)
            self.warn(f"step {step}: {text}")
            return
        known.since += 1
        if step - known.last_said >= self._config.report_every:
            line = f"step {step}: {text} ({known.since} times since step {known.last_said})"
            self._guard("terminal", lambda: self._console.warn(line))
            self._recurring[kind] = _Recurring(step)

    def phase(self, text: str) -> None:
        """What the run is doing now, for the terminal only."""
        self._guard("terminal", lambda: self._console.phase(text))

    def sync(self) -> None:
        """Force the records onto the disk, so that they survive a power cut too; call it before a checkpoint."""
        for file in (self._metrics, self._timings, self._samples):
            file.sync()

    def close(self, status: Status, reason: str | None = None) -> None:
        """End the record: final report, wandb, summary in the terminal. Safe to call twice; the first call
        counts."""
        if self._run["status"] != "running":
            return
        self._run.update(status=status, reason=reason)
        if self._wandb is not None:
            self._guard("wandb", lambda: self._wandb.finish(exit_code=0 if status == "finished" else 1))
        self._write_report(at_once=True)
        for file in (self._metrics, self._timings, self._samples):
            if status == "finished":
                file.close()
            else:  # a full disk must not hide what stopped the run
                self._guard(file.path.name, file.close)
        self._guard(
            "terminal", lambda: self._console.end_run(status, facts=self._summary(), ends=self._ends())
        )
        self._save_run()

    def _say_masked(self, step: int, rollouts: Sequence[Rollout], masked: Sequence[str | None]) -> None:
        """One line for each distinct reason; numbers in it (a place, a value) do not make another reason."""
        found: dict[str, list[int]] = {}
        for i, reason in enumerate(masked):
            if reason is not None:
                found.setdefault(re.sub(r"\d+", "#", reason), []).append(i)
        commonest = sorted(found.items(), key=lambda item: (-len(item[1]), item[1][0]))
        for kind, places in commonest[:_REASONS_SHOWN]:
            text = (
                f"{len(places)} of {len(rollouts)} responses left out of the loss, "
                f"{rollouts[places[0]].sample_id} first: {masked[places[0]]}"
            )
            self.recurring(step, text, kind=f"masked: {kind}")
        rest = commonest[_REASONS_SHOWN:]
        if rest:
            number = sum(len(places) for _, places in rest)
            text = f"{number} more responses left out of the loss for {len(rest)} other reasons"
            self.recurring(step, text, kind="masked: others")

    # --- run.json, the report, the sinks

    def _open_run(self, name: str, recipe: Mapping[str, Any], source: str | None) -> dict[str, Any]:
        path = self.run_dir / RUN_FILE
        try:
            before = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except ValueError:
            before = {}  # it describes the run for people; without it only the earlier sessions are forgotten
        sessions = before.get("sessions", []) if self._resume_step is not None else []
        now = time.time()
        return {
            "name": name,
            "status": "running",
            "reason": None,
            "recipe_source": source,
            "stages": before.get("stages", []) if self._resume_step is not None else [],
            "sessions": [*sessions, {"started": now, "updated": now, "resume_step": self._resume_step}],
            "versions": _versions(),
            "facts": before.get("facts", {}) if self._resume_step is not None else {},
            "warnings": before.get("warnings", []) if self._resume_step is not None else [],
            "dropped": {},
            "wandb_id": secrets.token_hex(4),
            "recipe": recipe,
        }

    def _save_run(self) -> None:
        self._run["sessions"][-1]["updated"] = time.time()
        text = json.dumps(self._run, indent=1, default=str) + "\n"
        self._guard(RUN_FILE, lambda: write_atomically(self.run_dir / RUN_FILE, text))

    def _write_report(self, *, at_once: bool) -> None:
        """Rewrite the report, unless that would take more than its share of the run's time."""
        if not at_once and time.monotonic() - self._report_done < self._report_cost_s / _REPORT_SHARE:
            return
        begun = time.monotonic()
        self._save_run()
        self._guard("report", lambda: build_report(self.run_dir))
        self._report_done = time.monotonic()
        self._report_cost_s = self._report_done - begun

    def _say_hello(self) -> None:
        self._console.begin_run(
            self._run["name"],
            recipe=self._run["recipe_source"],
            run_dir=str(self.run_dir),
            resume_step=self._resume_step,
        )
        if self._resume_step is not None:
            last = self._metrics.kept[-1]["step"] if self._metrics.kept else None
            if last != self._resume_step:
                self._console.warn(
                    f"{METRICS_FILE} ends at step {last}, the checkpoint is of step {self._resume_step}: "
                    "the records between are lost"
                )

    def _is_new(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is to be written. False if it was kept on resume; raises where the order is broken."""
        step, stage = record["step"], record["stage"]
        if step < self._last_step:
            raise ValueError(f"step {step} is logged after step {self._last_step}; steps must not go back")
        if step > self._last_step:
            self._kept.clear()
            self._logged.clear()
        if stage in self._logged:
            raise ValueError(
                f"step {step} of stage {stage!r} is logged twice; hand over one dict for the step"
            )
        self._last_step = step
        self._logged.add(stage)
        kept = self._kept.get(stage)
        if kept is not None and encode_record(kept) != encode_record(record):
            names = [k for k in {**kept, **record} if _json_of(kept, k) != _json_of(record, k)]
            self.warn(
                f"step {step} differs from its record before the resume in {', '.join(sorted(names)[:5])}"
            )
        return kept is None

    def _start_wandb(self, recipe: Mapping[str, Any]) -> None:
        """Open a new run in wandb and log what a resumed run has behind it: a run that was killed may have logged steps
        which come again, and wandb takes nothing back."""
        self._wandb = _Wandb(
            self.run_dir, self._config, run_id=self._run["wandb_id"], name=self._run["name"], recipe=recipe
        )
        measured = {(r["step"], r["stage"]): _numbers(decode_metrics(r)) for r in self._timings.kept}
        for record in map(decode_metrics, self._metrics.kept):
            more = measured.get((record["step"], record["stage"]), {})
            self._wandb.log({"step": record["step"], **_numbers(record), **more})

    def _guard(self, sink: str, call: Callable[[], object]) -> None:
        """The fault boundary of everything that is not the record: count what fails, say it once, go on."""
        try:
            call()
        except Exception as error:
            dropped = self._run["dropped"].setdefault(
                sink, {"count": 0, "error": f"{type(error).__name__}: {error}"}
            )
            dropped["count"] += 1
            if dropped["count"] == 1 and sink != "terminal":
                text = f"{sink} failed and was skipped ({dropped['error']}); the run goes on, its record is whole"
                self._guard("terminal", lambda: self._console.warn(text))

    def _summary(self) -> list[tuple[str, str]]:
        facts = []
        if not self._ends():
            for change in heldout_changes(self._headlines):
                facts.append(
                    (f"held out, {change.name.removeprefix('eval/')}", self._milestones(change.name))
                )
        if any("reward/mean" in r for r in self._headlines):
            first, last, count = trend_of(self._headlines, "reward/mean")
            steps = f" (first and last {count} steps)" if count > 1 else ""
            facts.append(("training reward", f"{format_value(first)} → {format_value(last)}{steps}"))
        if "model" in self._run["facts"]:
            facts.append(("model", self._run["facts"]["model"]))
        return [*facts, ("report", str(self.run_dir / REPORT_FILE))]

    def _milestones(self, name: str) -> str:
        """The metric's first value, and its last one in every stage: "1.0 % → 43.0 % (warmup) → 95.0 % (grpo)"."""
        (_, first), *last_of = self._ends_of(name).items()
        shown = [first]
        shown += [f"{value} ({stage})" if len(last_of) > 1 else value for stage, value in last_of]
        return " → ".join(shown)

    def _ends(self) -> list[list[str]]:
        """The same as rows of a table, a heading first and a column for every held-out set, where the stages are more
        than fit into a line; else none."""
        names = [change.name for change in heldout_changes(self._headlines)]
        columns = {name.removeprefix("eval/"): self._ends_of(name) for name in names}
        if all(len(column) <= _STAGES_IN_A_LINE + 1 for column in columns.values()):
            return []
        stages = dict.fromkeys(stage for column in columns.values() for stage in column)
        rows = [[stage, *(column.get(stage, "") for column in columns.values())] for stage in stages]
        return [["held out, after", *columns], *rows]

    def _ends_of(self, name: str) -> dict[str, str]:
        """{"start": the metric's first value, stage: its last value there}, in words."""
        share = is_share(name)
        first, *later = [r for r in self._headlines if name in r]
        last_of = {r["stage"]: format_value(r[name], share=share) for r in later}
        return {_START: format_value(first[name], share=share), **last_of}


class _Wandb:
    """Weights & Biases as a sink: same names, `step` as the axis, starts of one run in one group. Offline it needs
    neither account nor network, and the files of earlier starts go; nothing about machine, code or command line is
    sent. Any call may raise."""

    def __init__(
        self, run_dir: Path, config: TrackingConfig, *, run_id: str, name: str, recipe: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        wanted = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "save_code": False,
            "disable_job_creation": True,
            "x_disable_stats": True,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "init_timeout": 60,
            "login_timeout": 20,
            "finish_timeout": 60,
        }
        known = (
            wandb.Settings.model_fields
        )  # older versions lack a few of them and refuse what they do not know
        settings = wandb.Settings(**{name: value for name, value in wanted.items() if name in known})
        self._run = wandb.init(
            mode=config.wandb,
            project=config.wandb_project,
            name=name,
            id=run_id,
            group=name,
            dir=str(run_dir),
            config=dict(recipe),
            settings=settings,
        )
        for earlier in (run_dir / "wandb").glob("offline-run-*"):
            if not earlier.name.endswith(f"-{run_id}"):
                shutil.rmtree(earlier)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values))

    def finish(self, *, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def without_secrets(recipe: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """A copy of a recipe whose secrets are hidden: values that `rlhf.recipe.secrets` knows as one, and text that
    contains the value of an environment variable which it would hide."""
    known = [value for name, value in environ.items() if len(value) >= 8 and hides((name,), value)]

    def clean(path: tuple[Any, ...], item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: clean((*path, key), value) for key, value in item.items()}
        if isinstance(item, (list, tuple)):
            return [clean((*path, i), value) for i, value in enumerate(item)]
        if isinstance(item, str) and (hides(path, item) or any(secret in item for secret in known)):
            return HIDDEN
        return item

    return clean((), recipe)


def _as_numbers(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _as_number(name, value) for name, value in values.items()}


def _as_number(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes)) or value is None:
        raise TypeError(f"metric {name} is {value!r}; a metric is a number")
    if isinstance(value, int):
        return int(value)
    return float(value)


def _json_of(record: Mapping[str, Any], name: str) -> bytes:
    return encode_record({name: record.get(name)})


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if k not in ("step", "stage")}


def _headline_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the closing summary needs of a record."""
    return {k: v for k, v in record.items() if k in ("step", "stage", "reward/mean") or k.startswith("eval/")}


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count`, evenly spaced in the given order: different prompts rather than one group."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _sample_record(step: int, stage: str, rollout: Rollout, masked: str | None) -> dict[str, Any]:
    return {
        "step": step,
        "stage": stage,
        "sample_id": rollout.sample_id,
        "prompt_id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        "response": rollout.response_text,
        "reward": rollout.reward,
        "reward_parts": dict(rollout.reward_parts),
        "reward_error": rollout.reward_error,
        "masked": masked,
        "finish_reason": rollout.finish_reason,
        "response_tokens": len(rollout.response_ids),
    }


def _versions() -> dict[str, str]:
    """Installed versions, read from package metadata: nothing is imported."""
    versions = {"rlhf": rlhf.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
