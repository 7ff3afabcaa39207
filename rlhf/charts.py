"""Curves as HTML: thinning, axes, and an SVG that stretches to its card while its labels keep their size.

Here: one chart from numbers. Not here: which charts a report holds (`rlhf.report`).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_POINTS = 160  # of a small chart; a tall one has twice as many
MAX_NAMES = 4  # spans of a chart that are named above it; more are numbered
_DOTTED = 24  # up to so many points, or three a span, each has a dot
_SIZE = 1000  # both sides of the plot's own coordinates


@dataclass(frozen=True)
class Curve:
    """One metric over steps. `values` may hold NaN and infinities: they are shown as marks, never left out."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] | None = None  # lower edge of a band around the line, one per value
    high: Sequence[float] | None = None
    places: Sequence[int] | None = (
        None  # index of the chart's span in which each point lies; None: all in the first
    )


@dataclass(frozen=True)
class Span:
    """Steps first_step..last_step of the axis; step first_step - 1 is where they start. All spans of a chart are equally
    wide, however many steps they have: a short stage after a long one is as easy to read."""

    number: int  # stands for the name where there are many
    name: str
    first_step: int
    last_step: int
    joined: bool = True  # the line goes on from the span before; False where the model starts from elsewhere


@dataclass(frozen=True)
class _Points:
    places: list[int]
    steps: list[int]
    values: list[float]  # NaN where a bucket has no finite value: the line breaks there
    low: list[float]
    high: list[float]
    has_band: bool


def is_share(name: str) -> bool:
    """Whether a metric is a share of 1 and reads best in percent."""
    return (
        "_frac" in name
        or name.endswith("accuracy")
        or any(f"/{kind}@" in name for kind in ("pass", "mean", "maj"))
    )


def format_value(value: float | None, *, share: bool = False) -> str:
    """A number for people: three digits, percent for shares, "NaN" and "inf" as they are."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if share:
        return f"{100 * value:.0f} %" if value in (0, 1) else f"{100 * value:.1f} %"
    size = abs(value)
    if value == int(value) and size < 10_000:
        return str(int(value))
    if size >= 1e6 or size < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


def thin(curve: Curve, limit: int) -> _Points:
    """At most `limit` points, every span of the curve with an equal share of them: buckets of neighbouring records, their
    mean as the line, their extremes as a band."""
    by_place: dict[int, list[int]] = {}
    for i in range(len(curve.steps)):
        by_place.setdefault(0 if curve.places is None else curve.places[i], []).append(i)
    share = max(1, limit // max(1, len(by_place)))
    sizes = {place: math.ceil(len(rows) / share) for place, rows in by_place.items()}
    low = curve.values if curve.low is None else curve.low
    high = curve.values if curve.high is None else curve.high
    has_band = curve.low is not None or any(size > 1 for size in sizes.values())
    points = _Points([], [], [], [], [], has_band)
    for place, rows in sorted(by_place.items()):
        for start in range(0, len(rows), sizes[place]):
            bucket = rows[start : start + sizes[place]]
            finite = [curve.values[i] for i in bucket if math.isfinite(curve.values[i])]
            edges = [v for i in bucket for v in (low[i], high[i]) if math.isfinite(v)]
            points.places.append(place)
            points.steps.append(curve.steps[bucket[len(bucket) // 2]])
            points.values.append(sum(finite) / len(finite) if finite else math.nan)
            points.low.append(min(edges) if edges and finite else math.nan)
            points.high.append(max(edges) if edges and finite else math.nan)
    return points


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / width - 1e-9)
    last = math.floor(high / width + 1e-9)
    return [round(i * width, 12) for i in range(first, last + 1)]


def chart(
    curve: Curve,
    *,
    spans: Sequence[Span],
    tall: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """The plot of one curve over its spans, an HTML fragment."""
    points = thin(curve, 2 * MAX_POINTS if tall else MAX_POINTS)
    share = is_share(curve.name)
    bottom, top = y_range or _value_range(points, share)
    x = [_x(spans, place, step) for place, step in zip(points.places, points.steps, strict=True)]

    def y(value: float) -> float:
        return round((1 - (min(max(value, bottom), top) - bottom) / (top - bottom)) * _SIZE, 1)

    y_ticks = nice_ticks(bottom, top, 4)
    runs = _runs(points, spans)
    marks = [f'<path class="grid" d="M0 {y(t)}H{_SIZE}"/>' for t in y_ticks]
    marks += [f'<path class="stage" d="M{_edge(spans, i)} 0V{_SIZE}"/>' for i in range(1, len(spans))]
    if points.has_band:
        marks += [f'<path class="band" d="{_band_path(points, run, x, y)}"/>' for run in runs]
    line = "".join("M" + "L".join(f"{x[i]} {y(points.values[i])}" for i in run) for run in runs)
    marks.append(f'<path class="line" d="{line}"/>')
    few = len(points.steps) <= max(_DOTTED, 3 * len(spans))
    dots = "".join(f"M{x[i]} {y(points.values[i])}h0" for run in runs for i in run if few or len(run) == 1)
    marks.append(f'<path class="dot" d="{dots}"/>')
    marks.append(_broken_marks(curve, spans))
    labels = [
        f'<i class="y" style="top:{y(t) / 10:.1f}%">{format_value(t, share=share)}</i>' for t in y_ticks
    ]
    labels = [label.replace(".0 %", " %") for label in labels]
    labels += [
        f'<i class="x" style="left:{at / 10:.1f}%">{step}</i>'
        for at, step in _x_ticks(spans, 6 if tall else 4)
    ]
    labels += _names(spans, 15 if tall else 10)
    data = {
        "at": x,
        "x": points.steps,
        "y": [_short(v) for v in points.values],
        "v": [bottom, top],
        "p": int(share),
    }
    if len(spans) > 1:
        data |= {"k": points.places, "n": [span.name for span in spans]}
    if points.has_band:
        data |= {"l": [_short(v) for v in points.low], "h": [_short(v) for v in points.high]}
    return (
        f'<div class="plot{" tall" if tall else ""}" data-c="{html.escape(json.dumps(data, separators=(",", ":")))}">'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(describe(curve))}">{"".join(marks)}</svg>{"".join(labels)}</div>'
    )


def _edge(spans: Sequence[Span], index: int) -> float:
    """Where span number `index` begins, in the plot's coordinates."""
    return round(index / len(spans) * _SIZE, 1)


def _x(spans: Sequence[Span], place: int, step: float) -> float:
    span = spans[place]
    inside = (step - span.first_step + 1) / (span.last_step - span.first_step + 1)
    return round((place + min(max(inside, 0.0), 1.0)) / len(spans) * _SIZE, 1)


def _x_ticks(spans: Sequence[Span], count: int) -> list[tuple[float, int]]:
    """(place, step): round steps of a single span; where spans meet, of several, about `count` of them."""
    if len(spans) == 1:
        ticks = nice_ticks(spans[0].first_step - 1, spans[0].last_step, count)
        return [(_x(spans, 0, t), int(t)) for t in ticks if t == int(t)]
    ends = [(0.0, spans[0].first_step - 1)]
    ends += [(_edge(spans, i + 1), span.last_step) for i, span in enumerate(spans)]
    return ends[:: -math.ceil(len(ends) / count)]


def _names(spans: Sequence[Span], count: int) -> list[str]:
    """The names of several spans, every one of up to MAX_NAMES, numbers of more; of many about `count` numbers."""
    if len(spans) == 1:
        return []
    every = 1 if len(spans) <= MAX_NAMES else math.ceil(len(spans) / count)
    texts = [span.name if len(spans) <= MAX_NAMES else str(span.number) for span in spans]
    width = 100 / len(spans)
    return [
        f'<i class="s" style="left:{i * width:.1f}%;max-width:{every * width:.1f}%">{html.escape(texts[i])}</i>'
        for i in range(0, len(spans), every)
    ]


def _broken_marks(curve: Curve, spans: Sequence[Span]) -> str:
    """A tick for every value that is not finite, the last MAX_POINTS of them."""
    broken = [i for i, value in enumerate(curve.values) if not math.isfinite(value)][-MAX_POINTS:]
    places = curve.places or [0] * len(curve.steps)
    ticks = "".join(f"M{_x(spans, places[i], curve.steps[i])} {_SIZE}v-90" for i in broken)
    return f'<path class="broken" d="{ticks}"/>' if ticks else ""


def describe(curve: Curve) -> str:
    """The curve in one sentence, for readers who cannot see it."""
    share = is_share(curve.name)
    first, last = (format_value(curve.values[i], share=share) for i in (0, -1))
    return f"{curve.name}: {first} at step {curve.steps[0]}, {last} at step {curve.steps[-1]}"


def _value_range(points: _Points, share: bool) -> tuple[float, float]:
    values = [v for v in (*points.low, *points.high) if not math.isnan(v)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        pad = abs(low) / 2 or 1.0
        return low - pad, high + pad
    pad = 0.06 * (high - low)
    bottom = low - pad if low < 0 or low - pad > 0 else 0.0
    top = high + pad
    return bottom, min(top, 1.0) if share and high <= 1 else top


def _runs(points: _Points, spans: Sequence[Span]) -> list[list[int]]:
    """Indices of neighbouring finite values that one line joins."""
    runs: list[list[int]] = [[]]
    for i, value in enumerate(points.values):
        if i and points.places[i] != points.places[i - 1] and not spans[points.places[i]].joined:
            runs.append([])
        if math.isnan(value):
            runs.append([])
        else:
            runs[-1].append(i)
    return [run for run in runs if run]


def _band_path(points: _Points, run: Sequence[int], x: Sequence[float], y: Callable[[float], float]) -> str:
    upper = [f"{x[i]} {y(points.high[i])}" for i in run]
    lower = [f"{x[i]} {y(points.low[i])}" for i in reversed(run)]
    return "M" + "L".join(upper + lower) + "Z"


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.5g}")
