"""Curves of ``metrics.jsonl`` as inline SVG; those of several runs share one chart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from launcher.protocol.results import read_metrics
from launcher.runs.report.html import render_macro

if TYPE_CHECKING:
    from markupsafe import Markup

COLOURS = ("#2563eb", "#c2410c", "#15803d", "#7c3aed", "#b91c1c", "#0e7490", "#a16207", "#be185d", "#4d7c0f", "#475569")
_WIDTH, _HEIGHT = 640, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 34
_MOST_POINTS = 600
"""Most points of a line.
More cannot be distinguished. The extremes of each interval are kept, so no spike is lost."""
Point = tuple[float, float | None]
"""A step and its value; ``None`` leaves a gap."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    colour: str
    dashed: bool = False


def chart(title: str, lines: Sequence[Series], *, along: str) -> Markup:
    """Return a chart with its legend.

    Args:
        title: what the vertical axis shows.
        lines: at least one of them with a value.
        along: what the horizontal axis shows.
    """
    known = [(x, y) for line in lines for x, y in line.points if y is not None]
    axes = _Axes(*_span([x for x, _ in known]), *_span([y for _, y in known]))
    drawn = [
        {"name": line.name, "colour": line.colour, "dashed": line.dashed, "segments": list(axes.draw(line))}
        for line in lines
    ]
    return render_macro("chart", title, along, axes.frame(), drawn)


@dataclass(frozen=True)
class _Axes:
    """Ranges of both axes, and positions of values."""

    least_x: float
    most_x: float
    least_y: float
    most_y: float

    def x(self, value: float) -> float:
        share = (value - self.least_x) / (self.most_x - self.least_x)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.least_y) / (self.most_y - self.least_y)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self) -> dict[str, object]:
        """Return the size of the drawing, and positions and labels of its ticks."""
        return {
            "width": _WIDTH,
            "height": _HEIGHT,
            "left": _LEFT,
            "right": _WIDTH - _RIGHT,
            "bottom": _HEIGHT - _BOTTOM,
            "rows": [(f"{self.y(value):.1f}", short_number(value)) for value in ticks(self.least_y, self.most_y)],
            "columns": [(f"{self.x(value):.1f}", short_number(value)) for value in ticks(self.least_x, self.most_x)],
        }

    def draw(self, line: Series) -> Iterator[list[str]]:
        """Yield the positions ``x,y`` of a line's points between its gaps."""
        for segment in segments(line.points):
            yield [f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in thin_out(segment)]


def segments(points: Sequence[Point]) -> Iterator[list[tuple[float, float]]]:
    """Yield the points between gaps."""
    segment: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None:
            segment.append((x, y))
        elif segment:
            yield segment
            segment = []
    if segment:
        yield segment


def thin_out(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return fewer points that look the same.

    Of each interval these are the first, the lowest, the highest and the last.
    """
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(4 * len(points) / _MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        low, high = (pick(part, key=lambda number: points[number][1]) for pick in (min, max))
        kept += [points[number] for number in sorted({part[0], low, high, part[-1]})]
    return kept


def ticks(least: float, most: float, *, about: int = 5) -> list[float]:
    """Return round values within a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (most - least) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(least / step - 1e-9), math.floor(most / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short_number(value: float) -> str:
    """Return a number as a short text."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g} {unit}"
    return f"{value:.4g}" if size >= 1e-3 or not size else f"{value:.1e}"


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return a range that holds all values and is not empty."""
    least, most = min(values), max(values)
    if least < most:
        return least, most
    room = abs(least) / 2 or 0.5
    return least - room, most + room


MOST_METRICS = 256 << 20
"""Limit of a file of metrics or events, in bytes."""
Curves = Mapping[str, Sequence[Point]]
"""Points by metric."""
_STEP, _TIME = "train/step", "time"
_NOT_DRAWN = ("train/tokens", "train/skipped", "baseline/", "benchmark/", "verify/", "quantize/", "sparsify/")
"""Ramps and flags, baselines drawn with the loss, and figures shown in tables."""
_BASELINE, _PARTS = "baseline/", "time/"
_GREY = "#6b7280"


@dataclass(frozen=True, kw_only=True)
class _Chart:
    title: str
    metrics: tuple[str, ...]


_FIRST = (
    _Chart(title="loss, nats a token", metrics=("train/loss", "eval/loss")),
    _Chart(title="tokens a second", metrics=("perf/tokens_per_s",)),
    _Chart(title="learning rate", metrics=("train/lr",)),
    _Chart(title="norm of the gradient", metrics=("train/grad_norm",)),
    _Chart(title="share of the peak FLOP/s (MFU)", metrics=("perf/mfu",)),
    _Chart(title="peak memory of rank 0, bytes", metrics=("memory/peak_bytes",)),
)


def read_curves(path: Path) -> Curves:
    """Return the points of every metric; a value that is not finite is a gap."""
    curves: dict[str, list[Point]] = defaultdict(list)
    for line in read_metrics(path, limit=MOST_METRICS):
        step = line.get(_STEP)
        if not _is_number(step):
            continue
        for name, value in line.items():
            if name not in (_STEP, _TIME) and (value is None or _is_number(value)):
                curves[name].append((step, value))
    return curves


def charts_of(runs: Mapping[str, Curves]) -> Iterator[Markup]:
    """Yield a chart for each group of metrics that a run has at more than one step.

    Args:
        runs: curves by the displayed name of the run. A single run also has baselines and the parts of a step.
    """
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    taken = {metric for group in _FIRST for metric in group.metrics}
    alone = len(runs) == 1
    others = [name for name in names if name not in taken and not name.startswith((*_NOT_DRAWN, _PARTS))]
    parts = tuple(name for name in names if name.startswith(_PARTS)) if alone else ()
    for group in (
        *_FIRST,
        _Chart(title="where the time of a step goes, seconds", metrics=parts),
        *(_Chart(title=name, metrics=(name,)) for name in others),
    ):
        lines = list(_lines(group, runs))
        if any(len(line.points) > 1 and _has_value(line.points) for line in lines):
            if alone and group is _FIRST[0]:
                lines += _baselines(next(iter(runs.values())), lines)
            yield chart(group.title, [line for line in lines if _has_value(line.points)], along="step")


def _lines(group: _Chart, runs: Mapping[str, Curves]) -> Iterator[Series]:
    """Yield a line for each run and metric.

    Several runs differ in colour and their metrics in dashes; metrics of a single run differ in colour.
    """
    alone, colours = len(runs) == 1, cycle(COLOURS)
    for run, curves in runs.items():
        of_run = next(colours) if not alone else ""
        for number, metric in enumerate(group.metrics):
            colour = of_run or next(colours)
            if metric in curves:
                words = [*([] if alone else [run]), *([metric] if alone or len(group.metrics) > 1 else [])]
                dashed = bool(number) and not alone
                yield Series(name=" · ".join(words), points=curves[metric], colour=colour, dashed=dashed)


def _baselines(curves: Curves, lines: Sequence[Series]) -> Iterator[Series]:
    """Yield the losses to beat, from the first step to the last."""
    steps = [step for line in lines for step, _ in line.points]
    for name, points in curves.items():
        value = points[-1][1] if name.startswith(_BASELINE) else None
        if value is not None:
            ends = ((min(steps), value), (max(steps), value))
            yield Series(name=f"{name.removeprefix(_BASELINE)} {value:.2f}", points=ends, colour=_GREY, dashed=True)


def _has_value(points: Sequence[Point]) -> bool:
    return any(value is not None for _, value in points)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
