"""report.html: one self-contained page about a run, made from the files of its directory alone.

Here: what the page says and in which order. Not here: how a curve is drawn (`rlhf.charts`), style and script
(`rlhf.report_assets`), and what is recorded (`rlhf.tracking`). Everything a model or a dataset wrote is
escaped, and the page's policy allows no script but its own and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.charts import MAX_NAMES, Curve, Span, chart, format_value, is_share
from rlhf.metric_rules import MetricWatch
from rlhf.recipe.rules import SAMPLING, stage_of
from rlhf.report_assets import SCRIPT, STYLE
from rlhf.runlog import (
    METRICS_FILE,
    REPORT_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    TIMINGS_FILE,
    decode_metrics,
    read_records,
    write_atomically,
)

AREAS = {
    "reward": "Reward",
    "judge": "Judge",
    "eval": "Evaluation",
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimisation",
    "kto": "Judged answers",
    "rm": "Reward model",
    "prm": "Process reward model",
    "distill": "Distillation",
    "ptx": "Pretraining texts",
    "data": "Curriculum",
    "advantage": "Advantage",
    "policy": "Policy",
    "value": "Critic",
    "return": "Return",
    "rollout": "Rollout",
    "replay": "Replay",
    "mismatch": "Sampler against trainer",
    "staleness": "Staleness",
    "weights": "Weights",
    "robust": "Robustness",
    "cache": "Cache",
    "perf": "Speed",
    "time": "Time",
}
MAIN = {  # the metric of training that the first screen shows: the first of these that the run has
    "reward/mean": "Training reward",
    "rm/accuracy": "Training accuracy",
    "prm/accuracy": "Training accuracy",
    "dpo/accuracy": "Training accuracy",
    "distill/divergence": "Distance to the teacher",
    "kto/loss": "Training loss",
    "sft/loss": "Training loss",
}
BANDS = {  # line: (lower edge, upper edge); the edges get no chart of their own
    "reward/mean": ("reward/min", "reward/max"),
    "advantage/mean": ("advantage/min", "advantage/max"),
    "policy/ratio_mean": ("policy/ratio_min", "policy/ratio_max"),
}
LEADING = (  # the metrics that come first within their area; the others follow by name
    "reward/mean",
    "reward/std",
    *(
        f"{area}/{name}"
        for area in ("sft", "dpo", "kto", "rm", "prm", "distill")
        for name in ("loss", "accuracy")
    ),
    "policy/entropy",
    "policy/approx_kl",
    "policy/kl_ref",
    "policy/clip_frac",
    "policy/grad_norm",
    "time/step_s",
)
MAX_SAMPLE_STEPS = 12
MAX_TEXT = 3000  # characters of one prompt or response

_esc = html.escape


@dataclass(frozen=True)
class StageSpan:
    """The steps first_step..last_step that a stage covers; step first_step - 1 is its start."""

    name: str
    method: str
    first_step: int
    last_step: int
    number: int  # from 1
    starts_from: str | None  # the stage that its recipe names as its start


@dataclass(frozen=True)
class Change:
    """A metric before and after: its first and last value with their steps."""

    name: str
    first_step: int
    first: float
    last_step: int
    last: float


def build_report(run_dir: Path | str) -> Path:
    """Write report.html of a run directory, finished or not, and return its path. Raises FileNotFoundError if
    the directory holds no run.json."""
    run_dir = Path(run_dir)
    if not (run_dir / RUN_FILE).is_file():
        raise FileNotFoundError(f"{run_dir} holds no {RUN_FILE}: it is not the directory of a run")
    run = json.loads((run_dir / RUN_FILE).read_text("utf-8"))
    metrics = [decode_metrics(r) for r in read_records(run_dir / METRICS_FILE)]
    timings = [decode_metrics(r) for r in read_records(run_dir / TIMINGS_FILE)]
    page = render(run, metrics, timings, read_records(run_dir / SAMPLES_FILE))
    path = run_dir / REPORT_FILE
    write_atomically(path, page)
    return path


def heldout_changes(metrics: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Before and after of each evaluation set: pass@1, or the first other metric that the set has."""
    names = [name for record in metrics for name in record if name.startswith("eval/")]
    best: dict[str, str] = {}
    for name in names:
        which = name.rsplit("/", 1)[0]
        if which not in best or name.endswith("/pass@1"):
            best[which] = name
    return [change_of(metrics, name) for name in best.values()]


def change_of(metrics: Sequence[Mapping[str, Any]], name: str) -> Change:
    """First and last record of a metric that is present at least once."""
    found = [(r["step"], r[name]) for r in metrics if name in r]
    return Change(name, found[0][0], found[0][1], found[-1][0], found[-1][1])


def trend_of(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float, int]:
    """(mean of the first k values, mean of the last k, k) of a noisy metric; k is a tenth of them, from 1 to
    20."""
    values = [r[name] for r in metrics if name in r]
    k = max(1, min(20, len(values) // 10))
    return sum(values[:k]) / k, sum(values[-k:]) / k, k


def render(
    run: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    timings: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
) -> str:
    """The page. `run` is the content of run.json, the others are records in order of step."""
    stages = _stages(run, [*metrics, *timings])
    body = [
        _header(run, stages, metrics),
        _warnings(run, sorted([*metrics, *timings], key=lambda r: r["step"])),
        _heroes(stages, metrics),
        _samples(samples),
        _curves(stages, [*metrics, *timings]),
        _where_time_went(stages, timings),
        _facts(run, stages),
    ]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_esc(str(run['name']))} · rlhf</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )


# --- the first screen


def _header(run: Mapping[str, Any], stages: Sequence[StageSpan], metrics: Sequence[Mapping[str, Any]]) -> str:
    step = metrics[-1]["step"] if metrics else 0
    total = stages[-1].last_step if stages else step
    status = str(run["status"])
    recipe = run.get("recipe_source") or "written in Python"
    numbered = len(stages) > MAX_NAMES
    path = " → ".join(
        f"{f'<small>{s.number}</small> ' if numbered else ''}{_esc(s.name)} "
        f"<small>{s.last_step - s.first_step + 1} steps</small>"
        for s in stages
    )
    sessions = run["sessions"]
    updated = sessions[-1]["updated"]
    parts = [
        f"step <b>{step}</b> of {total}",
        f"<b>{_duration(sum(s['updated'] - s['started'] for s in sessions))}</b>",
        f"started {_clock(sessions[0]['started'])}",
    ]
    if len(sessions) > 1:
        parts.append(f"resumed {len(sessions) - 1}×")
    reason = f'<p class="reason">{_esc(str(run["reason"]))}</p>' if run.get("reason") else ""
    done = 100 * min(1.0, step / total) if total else 0
    return (
        f'<header><div class="title"><h1>{_esc(str(run["name"]))}</h1>'
        f'<span class="status {_esc(status)}" data-updated="{updated:.0f}">{_esc(status)}</span></div>'
        f'<p class="recipe"><span>recipe</span> <b>{_esc(str(recipe))}</b>'
        f"{'<span class=path>' + path + '</span>' if path else ''}</p>"
        f'<p class="progress">{" · ".join(parts)}</p>'
        f'<div class="bar"><div style="width:{done:.1f}%"></div></div>{reason}</header>'
    )


def _warnings(run: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    watch = MetricWatch()
    found = [(r["step"], text) for r in records for text in watch.update(_numbers(r))]
    items = [f"<li><b>step {step}</b> {_esc(text)}</li>" for step, text in found]
    items += [f"<li>{_esc(text)}</li>" for text in run.get("warnings", [])]
    for name, dropped in run.get("dropped", {}).items():
        items.append(f"<li><b>{_esc(name)}</b> failed {dropped['count']}×: {_esc(dropped['error'])}</li>")
    if not items:
        return ""
    heading = f"{len(items)} warning{'s' if len(items) > 1 else ''}"
    is_open = " open" if len(items) <= 4 else ""
    return (
        f'<details class="warnings"{is_open}><summary>{heading}</summary><ul>{"".join(items)}</ul></details>'
    )


def _heroes(stages: Sequence[StageSpan], metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return '<p class="empty">No step has been recorded yet.</p>'
    cards = [_heldout_card(stages, metrics, change) for change in heldout_changes(metrics)]
    present = {name for record in metrics for name in record}
    main = next((name for name in MAIN if name in present), None)
    if main is not None:
        first, last, k = trend_of(metrics, main)
        note = f"<code>{main}</code>, " + (
            f"mean of the first and last {k} steps" if k > 1 else "first and last step"
        )
        cards.append(_hero(MAIN[main], (first, last), note, _curve(metrics, main, None, stages)))
    return f'<section class="heroes">{"".join(cards)}</section>' if cards else ""


def _heldout_card(stages: Sequence[StageSpan], metrics: Sequence[Mapping[str, Any]], change: Change) -> str:
    _, which, metric = change.name.split("/", 2)
    drawn = _curve(metrics, change.name, None, stages)
    curve, spans = drawn
    share = is_share(change.name)
    values = _milestones(curve, spans)
    note = f"{_esc(metric)} on <b>{_esc(which)}</b>"
    if len(spans) <= MAX_NAMES:
        note += ": " + ", ".join(f"{format_value(v, share=share)} {_esc(when)}" for _, when, v in values)
        ends = ""
    else:
        note += f", last stage: {_esc(spans[-1].name)}"
        ends = _milestone_list(values, share)
    range_ = (0.0, 1.0) if share and all(0 <= v <= 1 for v in curve.values) else None
    title = "Held-out accuracy" if share else f"Held-out {_esc(metric)}"
    return _hero(title, (change.first, change.last), note, drawn, range_, ends)


def _milestones(curve: Curve, spans: Sequence[Span]) -> list[tuple[Span | None, str, float]]:
    """(span, when, value) of the first evaluation, which has no span, and of the last one within each stage."""
    found: list[tuple[Span | None, str, float]] = [(None, f"at step {curve.steps[0]}", curve.values[0])]
    for place, span in enumerate(spans):
        inside = [i for i in range(1, len(curve.steps)) if curve.places[i] == place]
        if inside:
            step = curve.steps[inside[-1]]
            when = f"after {span.name}" if step == span.last_step else f"at step {step}"
            found.append((span, when, curve.values[inside[-1]]))
    return found


def _milestone_list(values: Sequence[tuple[Span | None, str, float]], share: bool) -> str:
    """One line with a bar for every stage; 0 is where the bars begin."""
    finite = [value for _, _, value in values if math.isfinite(value)]
    longest = 1.0 if share else max(map(abs, finite), default=0.0) or 1.0
    rows = []
    for span, when, value in values:
        width = 100 * min(abs(value), longest) / longest if math.isfinite(value) else 0.0
        label = _esc(when) if span is None else f"<small>{span.number}</small> {_esc(span.name)}"
        if span is not None and when.startswith("at "):
            label += f" <small>{when}</small>"
        rows.append(
            f'<li><span>{label}</span><div class="bar"><div style="width:{width:.1f}%"></div></div>'
            f"<b>{format_value(value, share=share)}</b></li>"
        )
    return f'<ol class="ends">{"".join(rows)}</ol>'


def _hero(
    title: str,
    change: tuple[float, float],
    note: str,
    drawn: tuple[Curve, Sequence[Span]],
    y_range: tuple[float, float] | None = None,
    below: str = "",
) -> str:
    curve, spans = drawn
    first, last = (format_value(v, share=is_share(curve.name)) for v in change)
    wide = " wide" if len(spans) > MAX_NAMES else ""
    return (
        f'<article class="card hero{wide}"><h2>{title}</h2><p class="change"><span>{first}</span>'
        f'<span class="arrow">→</span><strong>{last}</strong></p><p class="note">{note}</p>'
        f"{chart(curve, spans=spans, tall=True, y_range=y_range)}{below}</article>"
    )


# --- curves


def _curves(stages: Sequence[StageSpan], records: Sequence[Mapping[str, Any]]) -> str:
    names = {name for r in records for name in r if name not in ("step", "stage")}
    names = sorted(names, key=lambda n: (LEADING.index(n) if n in LEADING else len(LEADING), n))
    bands = {line: pair for line, pair in BANDS.items() if _has_band(records, line, pair)}
    edges = {edge for pair in bands.values() for edge in pair}
    order = list(AREAS)
    areas: dict[str, list[str]] = {}
    for name in names:
        if name not in edges:
            areas.setdefault(name.split("/", 1)[0], []).append(name)
    sections = []
    for area in sorted(areas, key=lambda a: (order.index(a) if a in order else len(order), a)):
        curves = [_curve(records, name, bands.get(name), stages) for name in areas[area]]
        sections.append(_area(AREAS.get(area, area), curves))
    return f'<section><h2 class="head">Curves</h2>{"".join(sections)}</section>' if sections else ""


def _has_band(records: Sequence[Mapping[str, Any]], line: str, edges: tuple[str, str]) -> bool:
    """Whether every record of the line has both edges, and an edge moves: a constant one says more as a
    number."""
    rows = [[r.get(edge) for edge in edges] for r in records if line in r]
    return bool(rows) and all(None not in row for row in rows) and any(row != rows[0] for row in rows)


def _area(title: str, curves: Sequence[tuple[Curve, Sequence[Span]]]) -> str:
    cards, flat = [], []
    for curve, spans in curves:
        if len(curve.steps) > 1 and curve.low is None and len(set(curve.values)) == 1:
            value = format_value(curve.values[0], share=is_share(curve.name))
            steps = f"at all {len(curve.steps)} steps"
            flat.append(f"<li><code>{_esc(curve.name)}</code> <b>{value}</b> <small>{steps}</small></li>")
        else:
            cards.append(_small_card(curve, spans))
    constant = f'<ul class="flat">{"".join(flat)}</ul>' if flat else ""
    grid = f'<div class="grid">{"".join(cards)}</div>' if cards else ""
    return f"<h3>{_esc(title)}</h3>{grid}{constant}"


def _small_card(curve: Curve, spans: Sequence[Span]) -> str:
    broken = sum(not math.isfinite(v) for v in curve.values)
    note = f'<em class="bad">{broken} not finite</em>' if broken else ""
    if curve.low is not None:
        note += "<em>band: min to max</em>"
    value = format_value(curve.values[-1], share=is_share(curve.name))
    return (
        f'<article class="card"><h4><code>{_esc(curve.name)}</code>{note}<b>{value}</b></h4>'
        f"{chart(curve, spans=spans)}</article>"
    )


def _curve(
    records: Sequence[Mapping[str, Any]],
    name: str,
    band: tuple[str, str] | None,
    stages: Sequence[StageSpan],
) -> tuple[Curve, list[Span]]:
    """The curve, and the stages in which it has points."""
    rows = [r for r in records if name in r]
    steps, values = [r["step"] for r in rows], [float(r[name]) for r in rows]
    low, high = ([float(r[edge]) for r in rows] for edge in band) if band is not None else (None, None)
    shown = [stage for stage in stages if any(r["stage"] == stage.name for r in rows)]
    before = [None, *shown]
    spans = [
        Span(s.number, s.name, s.first_step, s.last_step, joined=_goes_on(s, previous))
        for s, previous in zip(shown, before, strict=False)
    ]
    index = {stage.name: i for i, stage in enumerate(shown)}
    return Curve(name, steps, values, low, high, [index[r["stage"]] for r in rows]), spans


def _goes_on(stage: StageSpan, previous: StageSpan | None) -> bool:
    """Whether a stage starts from the model of the stage that is shown before it."""
    return previous is not None and stage.starts_from in (None, previous.name)


# --- samples


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    by_step: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_step.setdefault((sample["step"], sample["stage"]), []).append(sample)
    if not by_step:
        return ""
    keys = list(by_step)
    chosen = _spread(keys, MAX_SAMPLE_STEPS)
    rewards = [s["reward"] for k in chosen for s in by_step[k] if isinstance(s["reward"], (int, float))]
    span = (min(rewards), max(rewards)) if rewards else (0.0, 1.0)
    blocks = [_sample_block(k, by_step[k], span, is_open=k in (keys[0], keys[-1])) for k in chosen]
    note = (
        f"{len(chosen)} of {len(keys)} recorded steps"
        if len(chosen) < len(keys)
        else f"{len(keys)} recorded steps"
    )
    return (
        f'<section class="samples"><h2 class="head">Samples <small>{note}; all are in {SAMPLES_FILE}</small></h2>'
        f'<div class="list">{"".join(blocks)}</div></section>'
    )


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _sample_block(
    key: tuple[int, str], rows: Sequence[Mapping[str, Any]], span: tuple[float, float], *, is_open: bool
) -> str:
    step, stage = key
    shown = [r["reward"] for r in rows if isinstance(r["reward"], (int, float))]
    mean = f"mean reward {format_value(sum(shown) / len(shown))}" if shown else "no reward"
    body = "".join(_sample_row(row, span) for row in rows)
    return (
        f"<details{' open' if is_open else ''}><summary><b>step {step}</b> <span>{_esc(stage)}</span>"
        f"<small>{len(rows)} sample{'s' if len(rows) != 1 else ''}, {mean}</small></summary>"
        '<div class="scroll"><table><thead><tr><th>prompt<th>response<th>reward<th>end</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _sample_row(row: Mapping[str, Any], span: tuple[float, float]) -> str:
    reward, low, high = row["reward"], *span
    if isinstance(reward, (int, float)):
        level = (reward - low) / (high - low) if high > low else 0.5
        pill = f'<span class="pill" style="--level:{level:.2f}">{format_value(reward)}</span>'
    elif reward or row["reward_error"]:
        pill = f'<span class="pill missing">{_esc(str(reward or "missing"))}</span>'
    else:
        pill = "-"  # nothing was to be judged
    parts = row["reward_parts"]
    if len(parts) > 1:
        each = "<br>".join(f"{_esc(str(k))} <b>{_number(v)}</b>" for k, v in parts.items())
        pill += f'<span class="parts">{each}</span>'
    if row["reward_error"]:
        pill += f'<div class="bad">{_esc(_shorten(row["reward_error"], 300))}</div>'
    end = f"{_esc(row['finish_reason'])}<small>{row['response_tokens']} tokens</small>"
    return (
        f"<tr><td><pre>{_text(row['prompt'])}</pre><td><pre>{_text(row['response'])}</pre>"
        f'<td class="num">{pill}<td class="end">{end}</tr>'
    )


def _text(text: str) -> str:
    return _esc(_shorten(text, MAX_TEXT)) or '<span class="none">(empty)</span>'


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … {len(text) - limit:,} more characters"


def _number(value: Any) -> str:
    return format_value(value) if isinstance(value, (int, float)) else _esc(str(value))


# --- time and facts


def _where_time_went(stages: Sequence[StageSpan], timings: Sequence[Mapping[str, Any]]) -> str:
    totals: dict[str, dict[str, float]] = {}
    for record in timings:
        for name, value in record.items():
            if name.startswith("time/") and name.endswith("_s") and math.isfinite(value):
                phases = totals.setdefault(record["stage"], {})
                phases[name] = phases.get(name, 0.0) + value
    blocks = []
    for stage in [s.name for s in stages if s.name in totals]:
        phases = totals[stage]
        whole = max(phases.pop("time/step_s", 0.0), sum(phases.values()))
        rows = sorted(phases.items(), key=lambda item: -item[1])
        body = "".join(_time_row(name, seconds, whole) for name, seconds in rows)
        blocks.append(
            f'<div class="card"><h4>{_esc(stage)}<b>{_duration(whole)}</b></h4><ul class="phases">{body}</ul></div>'
        )
    return (
        f'<section><h2 class="head">Where the time went</h2><div class="grid">{"".join(blocks)}</div></section>'
        if blocks
        else ""
    )


def _time_row(name: str, seconds: float, whole: float) -> str:
    share = min(100.0, 100 * seconds / whole) if whole else 0.0
    label = _esc(name.removeprefix("time/").removesuffix("_s").replace("_", " "))
    return (
        f'<li><span>{label}</span><div class="bar"><div style="width:{share:.1f}%"></div></div>'
        f"<b>{_duration(seconds)}</b><small>{share:.0f} %</small></li>"
    )


def _facts(run: Mapping[str, Any], stages: Sequence[StageSpan]) -> str:
    recipe = run["recipe"]
    groups = {
        "Recipe": _recipe_facts(recipe, stages),
        "Run": {**run.get("facts", {}), **_session_facts(run)},
        "Versions": run.get("versions", {}),
    }
    cards = []
    for title, facts in groups.items():
        rows = "".join(f"<dt>{_esc(str(k))}<dd>{_breakable(v)}" for k, v in facts.items())
        if rows:
            cards.append(f'<div class="card"><h4>{title}</h4><dl>{rows}</dl></div>')
    full = _esc("\n".join(_outline(recipe)))
    return (
        f'<section><h2 class="head">Facts</h2><div class="grid facts">{"".join(cards)}</div>'
        f'<details class="card full"><summary>The whole recipe, every default filled in</summary><pre>{full}</pre></details></section>'
    )


def _breakable(value: Any) -> str:
    """Escaped, with a break allowed after every / of a path, so that no word of it is cut."""
    return _esc(str(value)).replace("/", "/<wbr>")


def _session_facts(run: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    for i, session in enumerate(run["sessions"]):
        begun = (
            "started" if session["resume_step"] is None else f"resumed after step {session['resume_step']}"
        )
        facts[f"session {i + 1}"] = (
            f"{begun} {_clock(session['started'])}, {_duration(session['updated'] - session['started'])}"
        )
    return facts


_POLICY_GRADIENT = ("grpo", "ppo")
_PAIRS = ("dpo", "online_dpo")
_RECIPE_FACTS = (  # (label, path, the methods that read it; None: all); of one label the first that has a value
    ("model", "model.path", None),
    ("model", "model.build.model_type", None),
    ("weights", "model.dtype", None),
    ("LoRA rank", "model.lora.rank", None),
    ("teacher", "teacher.path", ("distill",)),
    ("reward model", "reward_model.path", SAMPLING),
    ("judge", "judge.path", SAMPLING),
    ("data", "data.path", None),
    ("data", "data.task", None),
    ("learning rate", "trainer.lr", None),
    ("critic's learning rate", "critic.lr", ("ppo",)),
    ("prompts per step", "trainer.prompts_per_step", None),
    ("group size", "rollout.group_size", SAMPLING),
    ("longest response", "rollout.max_response_tokens", SAMPLING),
    ("losses", "preference.losses", _PAIRS),
    ("loss", "kto.loss", ("kto",)),
    ("beta", "preference.beta", _PAIRS),
    ("beta", "kto.beta", ("kto",)),
    ("divergence", "distill.divergence", ("distill",)),
    ("own responses", "distill.on_policy_frac", ("distill",)),
    ("advantage", "algorithm.advantage", ("grpo",)),
    ("objective", "algorithm.objective", _POLICY_GRADIENT),
    ("aggregation", "algorithm.aggregation", _POLICY_GRADIENT),
    ("KL coefficient", "algorithm.kl_coef", _POLICY_GRADIENT),
    ("seed", "run.seed", None),
    ("runtime", "runtime.backend", None),
)


def _recipe_facts(recipe: Mapping[str, Any], stages: Sequence[StageSpan]) -> dict[str, str]:
    found: dict[str, dict[str, str]] = {}
    for label, path, methods in _RECIPE_FACTS:
        for stage in stages:
            value = _lookup(recipe, stage.name, path)
            if value is not None and (methods is None or stage.method in methods):
                found.setdefault(label, {}).setdefault(stage.name, _fact(value))
    return {label: _by_value(values) for label, values in found.items()}


def _fact(value: Any) -> str:
    """A value, or the names of several with their weights where these are not 1."""
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(name if weight == 1 else f"{weight} {name}" for name, weight in value.items())


def _by_value(values: Mapping[str, str]) -> str:
    """{stage: value} in words: what is the same in all is said once, what many share with their number."""
    stages_of: dict[str, list[str]] = {}
    for stage, value in values.items():
        stages_of.setdefault(value, []).append(stage)
    if len(stages_of) == 1:
        return next(iter(stages_of))
    named = {v: ", ".join(s) if len(s) <= 3 else f"{len(s)} stages" for v, s in stages_of.items()}
    return "; ".join(f"{value} ({which})" for value, which in named.items())


def _lookup(recipe: Mapping[str, Any], stage: str, path: str) -> Any:
    """The value at a dotted path, from the stage's own keys before the top level's."""
    for root in (recipe.get("stages", {}).get(stage, {}), recipe):
        value: Any = root
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _outline(value: Any, indent: str = "") -> list[str]:
    """Nested mappings as indented lines, for reading only."""
    lines = []
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        label = f"{indent}{key}:" if isinstance(value, Mapping) else f"{indent}-"
        if (
            isinstance(item, Mapping)
            and item
            or isinstance(item, (list, tuple))
            and any(isinstance(i, (Mapping, list, tuple)) for i in item)
        ):
            lines += [label, *_outline(item, indent + "  ")]
        else:
            lines.append(f"{label} {item if isinstance(item, str) else json.dumps(item, default=str)}")
    return lines


def _stages(run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[StageSpan]:
    """The stages as announced, in order; stages that only the records know come from the records."""
    recipe = run["recipe"]
    found = {s["name"]: (s["method"], s["first_step"], s["last_step"]) for s in run["stages"]}
    announced = set(found)
    for record in metrics:
        name, step = record["stage"], record["step"]
        if name not in announced:
            first = found[name][1] if name in found else max(1, step)
            found[name] = (name, first, max(first, step))
    ordered = sorted(found.items(), key=lambda item: item[1][1])
    return [
        StageSpan(name, method, first, last, number, _named_start(recipe, name))
        for number, (name, (method, first, last)) in enumerate(ordered, 1)
    ]


def _named_start(recipe: Mapping[str, Any], stage: str) -> str | None:
    path = _lookup(recipe, stage, "model.path")
    return stage_of(path) if isinstance(path, str) else None


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if k not in ("step", "stage")}


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
