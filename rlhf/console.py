"""What a run shows in the terminal: a bar per stage with its key metrics, samples with their rewards,
warnings.

Here: layout, and the difference between a terminal (bars that move) and a pipe or log file (plain lines). Not
here: what is recorded (`rlhf.tracking`). Text from a model or a dataset never reaches the terminal as markup
or control codes.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from rlhf.charts import format_value, is_share

if TYPE_CHECKING:
    from rlhf.records import Rollout

KEY_METRICS = {  # metric: its short name on the stage's line, in order of importance
    "reward/mean": "reward",
    "sft/loss": "loss",
    "dpo/loss": "loss",
    "kto/loss": "loss",
    "rm/loss": "loss",
    "prm/loss": "loss",
    "distill/loss": "loss",
    "dpo/accuracy": "accuracy",
    "rm/accuracy": "accuracy",
    "prm/accuracy": "accuracy",
    "dpo/margin": "margin",
    "rm/margin": "margin",
    "value/explained_variance": "explained",
    "rollout/response_tokens_mean": "tokens",
    "policy/entropy": "entropy",
    "policy/kl_ref": "kl",
    "policy/clip_frac": "clipped",
    "policy/grad_norm": "grad norm",
}
HELD_OUT = ("accuracy", "auc", "loss")  # of an evaluation, beside pass@k: what is said when it is made
SHOWN_METRICS = 4
MAX_BARS = 8
ETA_WIDTH = 12
_GAPS = 5  # between the columns beside a bar
PLAIN_EVERY_S = 5.0  # seconds between a stage's lines when the output is no terminal
MAX_CELL = 240  # characters of a prompt or response in the table

_STYLE = {"finished": "green", "failed": "red"}


class _Terminal(RichConsole):
    """A rich console that falls silent when its reader goes away; rich itself would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        if self.file is sys.stdout:  # a library's print would still end the run
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())


class Console:
    """The terminal of one run. `interactive` defaults to whether `file` (standard output) is a terminal."""

    def __init__(
        self, *, file: TextIO | None = None, interactive: bool | None = None, width: int | None = None
    ) -> None:
        file = file or sys.stdout
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="replace")  # an ASCII terminal gets "?" instead of an exception
        is_terminal = file.isatty() if interactive is None else interactive
        self._rich = _Terminal(
            file=file,
            force_terminal=is_terminal,
            width=width or (None if is_terminal else 100),
            highlight=False,
        )
        self.interactive = is_terminal and not self._rich.is_dumb_terminal
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._notes: dict[str, str] = {}  # what stands beside each bar
        self._spans: dict[str, tuple[int, int]] = {}
        self._ticks: deque[float] = deque(maxlen=21)
        self._last_line = 0.0

    def begin_run(self, name: str, *, recipe: str | None, run_dir: str, resume_step: int | None) -> None:
        line = Text.assemble((name, "bold"), "  ", (run_dir, "dim"))
        if recipe:
            line = Text.assemble((name, "bold"), ("  recipe ", "dim"), recipe, ("  in ", "dim"), run_dir)
        self._rich.print(line)
        if resume_step is not None:
            self._rich.print(Text(f"resumed after step {resume_step}", "cyan"))

    def begin_stage(self, name: str, *, first_step: int, last_step: int, done_step: int) -> None:
        """A stage of the steps first_step..last_step, of which those up to done_step are done already."""
        self._spans[name] = (first_step, last_step)
        self._ticks.clear()
        self._ticks.append(time.monotonic())
        self._last_line = 0.0
        total, done = last_step - first_step + 1, max(0, done_step - first_step + 1)
        if not self.interactive:
            resumed = f", {done} done" if done else ""
            self._rich.print(Text(f"stage {name}: {total} steps{resumed}"))
            return
        if self._progress is None:
            self._progress = self._start_progress()
        if len(self._tasks) >= max(1, min(MAX_BARS, self._rich.height - 6)):
            self._retire(next(iter(self._tasks)))
        self._notes[name] = ""
        self._tasks[name] = self._progress.add_task(
            name, total=total, completed=done, note="", eta="", phase=""
        )

    def phase(self, text: str) -> None:
        """What the run is doing now, for the wait before the next step; a pipe does not show it."""
        if self._progress is not None and self._tasks:
            stage, task = list(self._tasks.items())[-1]
            room = max(8, self._room() - len(self._notes[stage]) - 3)
            self._progress.update(task, eta="", phase=_printable(text, min(40, room)))

    def step(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """One step is done: move the bar, or print a line if the last one is old."""
        first, last = self._spans.get(stage, (1, step))
        evaluations = {k: v for k, v in metrics.items() if _is_headline(k)}
        if evaluations:
            self._print_evaluations(step, evaluations)
        if step < first:
            return
        self._ticks.append(time.monotonic())
        found, eta = _key_metrics(metrics), self._eta(last - step)
        note = "  ".join(found)
        if self.interactive and stage in self._tasks:
            while len(note) > self._room() - ETA_WIDTH and len(found) > 1:
                note = "  ".join(found := found[:-1])
            self._notes[stage] = note
            self._progress.update(
                self._tasks[stage], completed=step - first + 1, note=note, eta=eta, phase=""
            )
        elif step in (first, last) or time.monotonic() - self._last_line >= PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            width = len(str(last - first + 1))
            line = f"{stage}  {step - first + 1:{width}d}/{last - first + 1}  {note}  {eta}"
            self._rich.print(Text(line.rstrip()), soft_wrap=True)

    def samples(self, step: int, stage: str, rollouts: Sequence[Rollout]) -> None:
        """A small table of responses with their rewards."""
        title = Text(f"samples, step {step} ({stage})", "dim")
        table = Table(box=SIMPLE_HEAD, header_style="dim", expand=True, pad_edge=False)
        table.add_column("prompt", ratio=2, overflow="fold")
        table.add_column("response", ratio=3, overflow="fold")
        table.add_column("reward", justify="right", no_wrap=True)
        table.add_column("end", no_wrap=True)
        for rollout in rollouts:
            table.add_row(
                Text(_printable(rollout.prompt.text, MAX_CELL)),
                Text(_printable(rollout.response_text, MAX_CELL)),
                _reward_cell(rollout),
                Text(rollout.finish_reason, "dim" if rollout.finish_reason == "stop" else "yellow"),
            )
        self._rich.print(title)
        self._rich.print(table)

    def say(self, text: str) -> None:
        self._rich.print(Text(text))

    def warn(self, text: str) -> None:
        self._rich.print(Text.assemble(("warning ", "bold yellow"), text))

    def end_run(
        self, status: str, *, facts: Sequence[tuple[str, str]], ends: Sequence[Sequence[str]] = ()
    ) -> None:
        """Stop the bars and say how the run ended; why is said by who raised it. `facts`: (label, text) lines, for
        example accuracy and report. `ends`: rows of a table, its heading first."""
        self.stop()
        self._rich.print(Text(status, f"bold {_STYLE.get(status, 'yellow')}"))
        if ends:
            table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1))
            for i, heading in enumerate(ends[0]):
                table.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
            for row in ends[1:]:
                table.add_row(*map(Text, row))
            self._rich.print(table)
        width = max((len(label) for label, _ in facts), default=0)
        for label, text in facts:
            self._rich.print(Text.assemble((f"  {label:<{width}}  ", "dim"), text), soft_wrap=True)

    def stop(self) -> None:
        """Give the terminal back; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()

    @property
    def _bar_width(self) -> int:
        return max(8, min(32, self._rich.width - 72))

    def _room(self) -> int:
        """Characters of a line that are left for metrics and time; a line that is longer takes them from the bar."""
        counts = max(2 * len(str(last - first + 1)) + 1 for first, last in map(self._spans.get, self._tasks))
        return self._rich.width - max(map(len, self._tasks)) - self._bar_width - counts - _GAPS

    def _retire(self, stage: str) -> None:
        """A line in the place of a bar: more bars than the terminal has lines would hide the one that moves."""
        first, last = self._spans[stage]
        self._progress.remove_task(self._tasks.pop(stage))
        count = last - first + 1
        self._rich.print(Text(f"{stage}  {count}/{count}  {self._notes[stage]}"))

    def _start_progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=self._bar_width),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}", markup=False),
            TextColumn("{task.fields[eta]}", style="dim", markup=False),
            TextColumn("{task.fields[phase]}", style="dim", markup=False),
        )
        progress = Progress(*columns, console=self._rich, refresh_per_second=4)
        progress.start()
        return progress

    def _print_evaluations(self, step: int, evaluations: Mapping[str, float]) -> None:
        parts = [
            f"{name.removeprefix('eval/')} {format_value(v, share=is_share(name))}"
            for name, v in evaluations.items()
        ]
        self._rich.print(Text.assemble((f"step {step}  held out  ", "dim"), (",  ".join(parts), "bold")))

    def _eta(self, remaining: int) -> str:
        """Time for the remaining steps at the pace of the last twenty."""
        if remaining <= 0 or len(self._ticks) < 2:
            return ""
        seconds = (self._ticks[-1] - self._ticks[0]) / (len(self._ticks) - 1) * remaining
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"


def _is_headline(name: str) -> bool:
    return name.startswith("eval/") and ("/pass@" in name or name.rsplit("/", 1)[1] in HELD_OUT)


def _key_metrics(metrics: Mapping[str, float]) -> list[str]:
    found = [name for name in KEY_METRICS if name in metrics][:SHOWN_METRICS]
    return [f"{KEY_METRICS[n]} {format_value(metrics[n], share=is_share(n))}" for n in found]


def _reward_cell(rollout: Rollout) -> Text:
    if rollout.reward is None:
        return Text("missing", "red") if rollout.reward_error else Text("-")
    return Text(format_value(rollout.reward), "green" if rollout.reward > 0 else "")


def _printable(text: str, limit: int) -> str:
    """One line without control codes; a long text keeps its beginning and its end."""
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[len(text) - limit // 2 :]}"
    return text
