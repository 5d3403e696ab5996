"""What the pipeline benchmark found: idle shares beside theory, throughput beside one stage."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.bubble import longest_path
from launcher.benchmarks.pipeline import PipelineBenchmark
from launcher.benchmarks.pipelined import Pipelined
from launcher.benchmarks.results import Case, Results
from launcher.errors import JobError

if TYPE_CHECKING:
    from launcher.benchmarks.ranked import Taken

_SAME = 1e-9


@dataclass(frozen=True, kw_only=True)
class _Found:
    """One pipeline with what was found in all rounds."""

    pipelined: Pipelined
    idle: float | None
    theory: float | None
    live: list[int] | None
    """Most micro-batches' activations held at once, by rank, all its stretches together."""
    tokens_per_s: float | None
    speedup: float | None
    """Throughput as a multiple of that of one stage, paired by round."""


def report(benchmark: PipelineBenchmark, found: Mapping[str, Sequence[Taken]]) -> Results:
    """Return the findings of all pipelines.

    Raises:
        JobError: a formula disagrees with the schedule that torch made, so that one of them is not what it should be.
    """
    rows = [_row(one, found) for one in benchmark.pipelines]
    cases = [
        Case(name=name, samples={key: tuple(taken.numbers[key] for taken in rounds) for key in rounds[0].numbers})
        for name, rounds in found.items()
    ]
    return Results(
        benchmark=benchmark,
        cases=cases,
        facts={row.pipelined.name: _facts(row) for row in rows},
        said=tuple(_said(benchmark, rows)),
        metrics=dict(_metrics(rows)),
        tables=tuple(_table(rows)),
    )


def theory_of(one: Pipelined, order: Mapping[Any, Any]) -> float | None:
    """Return the idle share by formula, or by the longest path through the schedule's order where no formula holds.

    Raises:
        JobError: both are there and differ.
    """
    by_path = longest_path(order, stretches=one.stages * one.chunks) if order else None
    if by_path is not None and one.formula is not None and abs(by_path - one.formula) > _SAME:
        raise JobError(f"{one.in_words}: idle {one.formula:.2%} by the formula, {by_path:.2%} by the longest path")
    return one.formula if by_path is None else by_path


def _row(one: Pipelined, found: Mapping[str, Sequence[Taken]]) -> _Found:
    rounds = found[one.name]
    speeds = [taken.numbers.get("tokens_per_s") for taken in rounds]
    idle = [taken.numbers["idle_share"] for taken in rounds] if one.stages > 1 else None
    pairs: list[float] = []
    if one.passes == "model" and one.stages > 1:
        single = Pipelined(passes="model", work=one.work, schedule="gpipe", stages=1, micro_batches=one.micro_batches)
        alone = [taken.numbers["tokens_per_s"] for taken in found[single.name]]
        pairs = [speed / base for speed, base in zip(speeds, alone, strict=True) if speed is not None]
    sleeps = one.passes == "sleep"
    order = rounds[-1].answers[0]["order"] if sleeps else {}
    live = [max(taken.answers[rank]["live"] for taken in rounds) for rank in range(one.stages)] if sleeps else None
    return _Found(
        pipelined=one,
        idle=statistics.median(idle) if idle else None,
        theory=theory_of(one, order) if one.stages > 1 else None,
        live=live if one.work == "train" else None,
        tokens_per_s=statistics.median(speed for speed in speeds if speed is not None) if not sleeps else None,
        speedup=statistics.median(pairs) if pairs else None,
    )


def _facts(row: _Found) -> dict[str, Any]:
    one = row.pipelined
    return {
        **{name: getattr(one, name) for name in ("passes", "work", "schedule", "stages", "micro_batches")},
        **{name: getattr(row, name) for name in ("idle", "theory", "live", "tokens_per_s", "speedup")},
        "formula_holds": one.stages > 1 and one.formula is not None,
    }


def _metrics(rows: Sequence[_Found]) -> Iterator[tuple[str, float]]:
    for row in rows:
        for name in ("idle", "theory", "tokens_per_s", "speedup"):
            value = getattr(row, name)
            if value is not None:
                yield f"{row.pipelined.name}/{name}", value


def _said(benchmark: PipelineBenchmark, rows: Sequence[_Found]) -> Iterator[str]:
    """Yield how far idle shares are from theory, and what stages bring."""
    for passes in benchmark.passes:
        told = [(row.pipelined, row.idle, row.theory) for row in rows if row.pipelined.passes == passes]
        apart = [
            (abs(idle - theory), one, idle, theory)
            for one, idle, theory in told
            if idle is not None and theory is not None
        ]
        if apart:
            points, one, idle, theory = max(apart, key=lambda entry: entry[0])
            yield (
                f"stages of {'the model' if passes == 'model' else 'a known time'}: idle shares within "
                f"{100 * points:.1f} points of theory in all {len(apart)} cases; the farthest is {one.in_words}: "
                f"{idle:.1%}, theory {theory:.1%}"
            )
    for row in rows:
        if row.speedup is not None and row.idle is not None:
            yield (
                f"{row.pipelined.in_words}: {row.tokens_per_s:,.0f} tokens/s, {row.speedup:.2f} times one stage; "
                f"idle {row.idle:.1%}"
            )
    cores, most = len(os.sched_getaffinity(0)), max(benchmark.stages)
    if benchmark.needs_model and most > cores:
        yield f"{most} stages share {cores} cores: they keep each other waiting while they compute"
    yield from (f"left out: {what}: {why}" for what, why in benchmark.left_out.items())


def _table(rows: Sequence[_Found]) -> Iterator[str]:
    """Yield a Markdown table, a row for each pipeline."""
    heads = ("stages", "work", "schedule", "number", "micro-batches", "idle, theory", "idle, measured")
    yield f"| {' | '.join((*heads, 'live activations by rank', 'tokens/s', 'against one stage'))} |"
    yield "|---" * (len(heads) + 3) + "|"
    for row in rows:
        one = row.pipelined
        theory = "" if row.theory is None else f"{row.theory:.1%}{'' if one.formula is not None else ' *'}"
        cells = (
            *(one.passes, one.work, one.schedule if one.schedules else "", str(one.stages), str(one.micro_batches)),
            theory,
            "" if row.idle is None else f"{row.idle:.1%}",
            "" if row.live is None else ", ".join(map(str, row.live)),
            "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
            "" if row.speedup is None else f"{row.speedup:.2f}",
        )
        yield f"| {' | '.join(cells)} |"
    if any(row.theory is not None and row.pipelined.formula is None for row in rows):
        yield ""
        yield "\\* too few micro-batches to fill the pipeline: the longest path through the schedule's order"
