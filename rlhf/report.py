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

from rlhf.charts import Curve, chart, format_value, is_share
from rlhf.metric_rules import MetricWatch
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
    "eval": "Evaluation",
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimisation",
    "rm": "Reward model",
    "advantage": "Advantage",
    "policy": "Policy",
    "value": "Critic",
    "return": "Return",
    "rollout": "Rollout",
    "mismatch": "Sampler against trainer",
    "staleness": "Staleness",
    "weights": "Weights",
    "robust": "Robustness",
    "cache": "Cache",
    "perf": "Speed",
    "time": "Time",
}
BANDS = {  # line: (lower edge, upper edge); the edges get no chart of their own
    "reward/mean": ("reward/min", "reward/max"),
    "advantage/mean": ("advantage/min", "advantage/max"),
    "policy/ratio_mean": ("policy/ratio_min", "policy/ratio_max"),
}
LEADING = (  # the metrics that come first within their area; the others follow by name
    "reward/mean",
    "reward/std",
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
    stages = _stages(run, metrics)
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
    path = " → ".join(f"{_esc(s.name)} <small>{s.last_step - s.first_step + 1} steps</small>" for s in stages)
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
    cards = [_heldout_card(stages, metrics, change) for change in heldout_changes(metrics)]
    present = {name for record in metrics for name in record}
    main = next((n for n in ("reward/mean", "rm/accuracy", "dpo/accuracy", "sft/loss") if n in present), None)
    if main is not None:
        first, last, k = trend_of(metrics, main)
        title = {"reward/mean": "Training reward", "sft/loss": "Training loss"}.get(main, main)
        note = f"mean of the first and last {k} steps" if k > 1 else "first and last step"
        curve = _curve(metrics, main, None)
        cards.append(_hero(title, main, (first, last), note, stages, curve))
    if not cards:
        return '<p class="empty">No step has been recorded yet.</p>'
    return f'<section class="heroes">{"".join(cards)}</section>'


def _heldout_card(stages: Sequence[StageSpan], metrics: Sequence[Mapping[str, Any]], change: Change) -> str:
    _, which, metric = change.name.split("/", 2)
    curve = _curve(metrics, change.name, None)
    note = f"{_esc(metric)} on <b>{_esc(which)}</b>: " + ", ".join(_milestones(curve, stages))
    inside = all(0 <= v <= 1 for v in curve.values)
    range_ = (0.0, 1.0) if is_share(change.name) and inside else None
    return _hero("Held-out accuracy", change.name, (change.first, change.last), note, stages, curve, range_)


def _milestones(curve: Curve, stages: Sequence[StageSpan]) -> list[str]:
    """The value at the first evaluation and at the last one within each stage."""
    share = is_share(curve.name)
    found = {curve.steps[0]: f"{format_value(curve.values[0], share=share)} at step {curve.steps[0]}"}
    for stage in stages:
        inside = [i for i, step in enumerate(curve.steps) if stage.first_step <= step <= stage.last_step]
        if inside:
            step = curve.steps[inside[-1]]
            when = f"after {_esc(stage.name)}" if step == stage.last_step else f"at step {step}"
            found[step] = f"{format_value(curve.values[inside[-1]], share=share)} {when}"
    return list(found.values())


def _hero(
    title: str,
    name: str,
    change: tuple[float, float],
    note: str,
    stages: Sequence[StageSpan],
    curve: Curve,
    y_range: tuple[float, float] | None = None,
) -> str:
    first, last = (format_value(v, share=is_share(name)) for v in change)
    span, marks = _span(curve, stages)
    return (
        f'<article class="card hero"><h2>{title}</h2><p class="change"><span>{first}</span>'
        f'<span class="arrow">→</span><strong>{last}</strong></p><p class="note">{note}</p>'
        f"{chart(curve, x_range=span, boundaries=marks, tall=True, y_range=y_range)}</article>"
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
        curves = [_curve(records, name, bands.get(name)) for name in areas[area]]
        sections.append(_area(AREAS.get(area, area), curves, stages))
    return f'<section><h2 class="head">Curves</h2>{"".join(sections)}</section>' if sections else ""


def _has_band(records: Sequence[Mapping[str, Any]], line: str, edges: tuple[str, str]) -> bool:
    """Whether every record of the line has both edges, and an edge moves: a constant one says more as a
    number."""
    rows = [[r.get(edge) for edge in edges] for r in records if line in r]
    return bool(rows) and all(None not in row for row in rows) and any(row != rows[0] for row in rows)


def _area(title: str, curves: Sequence[Curve], stages: Sequence[StageSpan]) -> str:
    cards, flat = [], []
    for curve in curves:
        if len(curve.steps) > 1 and curve.low is None and len(set(curve.values)) == 1:
            value = format_value(curve.values[0], share=is_share(curve.name))
            steps = f"at all {len(curve.steps)} steps"
            flat.append(f"<li><code>{_esc(curve.name)}</code> <b>{value}</b> <small>{steps}</small></li>")
        else:
            cards.append(_small_card(curve, stages))
    constant = f'<ul class="flat">{"".join(flat)}</ul>' if flat else ""
    grid = f'<div class="grid">{"".join(cards)}</div>' if cards else ""
    return f"<h3>{_esc(title)}</h3>{grid}{constant}"


def _small_card(curve: Curve, stages: Sequence[StageSpan]) -> str:
    span, marks = _span(curve, stages)
    broken = sum(not math.isfinite(v) for v in curve.values)
    note = f'<em class="bad">{broken} not finite</em>' if broken else ""
    if curve.low is not None:
        note += "<em>band: min to max</em>"
    value = format_value(curve.values[-1], share=is_share(curve.name))
    return (
        f'<article class="card"><h4><code>{_esc(curve.name)}</code>{note}<b>{value}</b></h4>'
        f"{chart(curve, x_range=span, boundaries=marks)}</article>"
    )


def _curve(records: Sequence[Mapping[str, Any]], name: str, band: tuple[str, str] | None) -> Curve:
    rows = [r for r in records if name in r]
    steps, values = [r["step"] for r in rows], [float(r[name]) for r in rows]
    if band is None:
        return Curve(name, steps, values)
    low, high = ([float(r[edge]) for r in rows] for edge in band)
    return Curve(name, steps, values, low, high)


def _span(curve: Curve, stages: Sequence[StageSpan]) -> tuple[tuple[int, int], list[tuple[int, str]]]:
    """The steps of the stages in which the curve has points, and the stage boundaries among them."""
    first, last = curve.steps[0], curve.steps[-1]
    inside = [s for s in stages if s.last_step >= first and s.first_step <= last]
    if not inside:
        return (first, last), []
    left = min(first, inside[0].first_step)
    marks = [(s.first_step, s.name) for s in inside] if len(inside) > 1 else []
    return (left, inside[-1].last_step), marks


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
    else:
        pill = f'<span class="pill missing">{_esc(str(reward or "missing"))}</span>'
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
        rows = "".join(f"<dt>{_esc(str(k))}<dd>{_esc(str(v))}" for k, v in facts.items())
        if rows:
            cards.append(f'<div class="card"><h4>{title}</h4><dl>{rows}</dl></div>')
    full = _esc("\n".join(_outline(recipe)))
    return (
        f'<section><h2 class="head">Facts</h2><div class="grid">{"".join(cards)}</div>'
        f'<details class="card full"><summary>The whole recipe, every default filled in</summary><pre>{full}</pre></details></section>'
    )


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


_RECIPE_FACTS = {
    "model": ("model.path", "model.build.model_type"),
    "weights": ("model.dtype",),
    "LoRA rank": ("model.lora.rank",),
    "data": ("data.path", "data.task"),
    "learning rate": ("trainer.lr",),
    "prompts per step": ("trainer.prompts_per_step",),
    "group size": ("rollout.group_size",),
    "longest response": ("rollout.max_response_tokens",),
    "advantage": ("algorithm.advantage",),
    "aggregation": ("algorithm.aggregation",),
    "KL coefficient": ("algorithm.kl_coef",),
    "seed": ("run.seed",),
    "runtime": ("runtime.backend",),
}
_NOT_IN_SFT = ("group size", "advantage", "aggregation", "KL coefficient")


def _recipe_facts(recipe: Mapping[str, Any], stages: Sequence[StageSpan]) -> dict[str, str]:
    facts = {}
    for label, paths in _RECIPE_FACTS.items():
        found = {}
        for stage in stages:
            value = next((v for v in (_lookup(recipe, stage.name, p) for p in paths) if v is not None), None)
            if value is not None and not (stage.method == "sft" and label in _NOT_IN_SFT):
                found[stage.name] = str(value)
        if len(set(found.values())) == 1:
            facts[label] = next(iter(found.values()))
        elif found:
            facts[label] = ", ".join(f"{value} ({name})" for name, value in found.items())
    return facts


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
    spans = {
        s["name"]: StageSpan(s["name"], s["method"], s["first_step"], s["last_step"]) for s in run["stages"]
    }
    for record in metrics:
        name, step = record["stage"], record["step"]
        if name not in spans:
            spans[name] = StageSpan(name, name, max(1, step), step)
        elif name not in {s["name"] for s in run["stages"]}:
            spans[name] = StageSpan(name, name, spans[name].first_step, step)
    return sorted(spans.values(), key=lambda s: s.first_step)


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
