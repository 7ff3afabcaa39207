"""Curves as HTML: thinning, axes, and an SVG that stretches to its card while its labels keep their size.

Here: one chart from numbers. Not here: which charts a report holds (`rlhf.report`).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_POINTS = 160  # of a small chart; a tall one has twice as many
_SIZE = 1000  # both sides of the plot's own coordinates


@dataclass(frozen=True)
class Curve:
    """One metric over steps. `values` may hold NaN and infinities: they are shown as marks, never left out."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] | None = None  # lower edge of a band around the line, one per value
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class _Points:
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
    """At most `limit` points: buckets of neighbouring records, their mean as the line, their extremes as a
    band."""
    size = max(1, math.ceil(len(curve.steps) / limit))
    low = curve.values if curve.low is None else curve.low
    high = curve.values if curve.high is None else curve.high
    points = _Points([], [], [], [], size > 1 or curve.low is not None)
    for start in range(0, len(curve.steps), size):
        cut = slice(start, start + size)
        finite = [v for v in curve.values[cut] if math.isfinite(v)]
        edges = [v for v in (*low[cut], *high[cut]) if math.isfinite(v)]
        steps = curve.steps[cut]
        points.steps.append(steps[len(steps) // 2])
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
    x_range: tuple[int, int],
    boundaries: Sequence[tuple[int, str]] = (),
    tall: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """The plot of one curve, an HTML fragment. `boundaries`: (first step, name) of each stage within
    `x_range`."""
    points = thin(curve, 2 * MAX_POINTS if tall else MAX_POINTS)
    share = is_share(curve.name)
    bottom, top = y_range or _value_range(points, share)
    left, right = x_range[0], max(x_range[1], x_range[0] + 1)

    def x(step: float) -> float:
        return round((step - left) / (right - left) * _SIZE, 1)

    def y(value: float) -> float:
        return round((1 - (min(max(value, bottom), top) - bottom) / (top - bottom)) * _SIZE, 1)

    y_ticks = nice_ticks(bottom, top, 4)
    x_ticks = [t for t in nice_ticks(left, right, 5 if tall else 4) if t == int(t)]
    marks = [f'<path class="grid" d="M0 {y(t)}H{_SIZE}"/>' for t in y_ticks]
    marks += [f'<path class="stage" d="M{x(s - 0.5)} 0V{_SIZE}"/>' for s, _ in boundaries[1:]]
    if points.has_band:
        marks += [f'<path class="band" d="{d}"/>' for d in _band_paths(points, x, y)]
    line = _line_path(points, x, y)
    marks.append(f'<path class="line" d="{line}"/>')
    runs = _finite_runs(points.values)
    dots = (
        range(len(points.steps))
        if len(points.steps) <= 24
        else [i for run in runs if len(run) == 1 for i in run]
    )
    dotted = "".join(
        f"M{x(points.steps[i])} {y(points.values[i])}h0" for i in dots if not math.isnan(points.values[i])
    )
    marks.append(f'<path class="dot" d="{dotted}"/>')
    broken = [s for s, v in zip(curve.steps, curve.values, strict=True) if not math.isfinite(v)]
    ticks = "".join(f"M{x(s)} {_SIZE}v-90" for s in broken[-MAX_POINTS:])
    marks.append(f'<path class="broken" d="{ticks}"/>' if broken else "")
    labels = [
        f'<i class="y" style="top:{y(t) / 10:.1f}%">{format_value(t, share=share)}</i>' for t in y_ticks
    ]
    labels = [label.replace(".0 %", " %") for label in labels]
    labels += [f'<i class="x" style="left:{x(t) / 10:.1f}%">{int(t)}</i>' for t in x_ticks]
    labels += [
        f'<i class="s" style="left:{max(x(s - 0.5), 0) / 10:.1f}%">{html.escape(n)}</i>'
        for s, n in boundaries
        if n
    ]
    data = {
        "x": points.steps,
        "y": [_short(v) for v in points.values],
        "r": [left, right],
        "v": [bottom, top],
    }
    data["p"] = int(share)
    if points.has_band:
        data["l"] = [_short(v) for v in points.low]
        data["h"] = [_short(v) for v in points.high]
    return (
        f'<div class="plot{" tall" if tall else ""}" data-c="{html.escape(json.dumps(data, separators=(",", ":")))}">'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(describe(curve))}">{"".join(marks)}</svg>{"".join(labels)}</div>'
    )


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


def _finite_runs(values: Sequence[float]) -> list[list[int]]:
    """Indices of neighbouring finite values."""
    runs: list[list[int]] = [[]]
    for i, value in enumerate(values):
        if math.isnan(value):
            runs.append([])
        else:
            runs[-1].append(i)
    return [run for run in runs if run]


def _line_path(points: _Points, x, y) -> str:
    runs = _finite_runs(points.values)
    return "".join("M" + "L".join(f"{x(points.steps[i])} {y(points.values[i])}" for i in run) for run in runs)


def _band_paths(points: _Points, x, y) -> list[str]:
    paths = []
    for run in _finite_runs(points.values):
        upper = [f"{x(points.steps[i])} {y(points.high[i])}" for i in run]
        lower = [f"{x(points.steps[i])} {y(points.low[i])}" for i in reversed(run)]
        paths.append("M" + "L".join(upper + lower) + "Z")
    return paths


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.5g}")
