"""Curves of ``metrics.jsonl``: which metrics stand together, and those of several runs over each other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TypeGuard

from launcher.report.chart import COLOURS, Line, Point, chart
from launcher.report.markup import Html
from launcher.report.parts import MOST_METRICS
from launcher.results import read_metrics

Curves = Mapping[str, Sequence[Point]]
"""Points by metric."""

_STEP, _TIME = "train/step", "time"
_NOT_DRAWN = ("train/tokens", "train/skipped", "baseline/", "benchmark/", "verify/", "quantize/")
"""Ramps and flags, levels that are drawn with the loss, and figures that stand in tables."""
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
    """Return the points of every metric; a value that was not finite is a gap."""
    curves: dict[str, list[Point]] = defaultdict(list)
    for line in read_metrics(path, limit=MOST_METRICS):
        step = line.get(_STEP)
        if not _is_number(step):
            continue
        for name, value in line.items():
            if name not in (_STEP, _TIME) and (value is None or _is_number(value)):
                curves[name].append((step, value))
    return curves


def charts_of(runs: Mapping[str, Curves]) -> Iterator[Html]:
    """Yield a chart for each group of metrics that some run has at more than one step.

    Args:
        runs: curves by the name a reader knows the run by. One run has its baselines and the parts of a step as well.
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


def _lines(group: _Chart, runs: Mapping[str, Curves]) -> Iterator[Line]:
    """Yield a line for each run and metric: runs differ in colour, metrics of one run in dashes; one run in colours."""
    alone, colours = len(runs) == 1, cycle(COLOURS)
    for run, curves in runs.items():
        of_run = next(colours) if not alone else ""
        for number, metric in enumerate(group.metrics):
            colour = of_run or next(colours)
            if metric in curves:
                words = [*([] if alone else [run]), *([metric] if alone or len(group.metrics) > 1 else [])]
                dashed = bool(number) and not alone
                yield Line(name=" · ".join(words), points=curves[metric], colour=colour, dashed=dashed)


def _baselines(curves: Curves, lines: Sequence[Line]) -> Iterator[Line]:
    """Yield the losses that a model has to beat, from the first step to the last."""
    steps = [step for line in lines for step, _ in line.points]
    for name, points in curves.items():
        value = points[-1][1] if name.startswith(_BASELINE) else None
        if value is not None:
            ends = ((min(steps), value), (max(steps), value))
            yield Line(name=f"{name.removeprefix(_BASELINE)} {value:.2f}", points=ends, colour=_GREY, dashed=True)


def _has_value(points: Sequence[Point]) -> bool:
    return any(value is not None for _, value in points)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
