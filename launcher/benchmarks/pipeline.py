"""The pipeline benchmark: time and idle share of micro-batches in pipelines."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.harness import DistributedCase, run_interleaved
from launcher.benchmarks.pipeline_bubble import formula_of, theory_of
from launcher.benchmarks.pipeline_stages import fold_ranks, run_model_stages, run_sleeping_stages
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
from launcher.config.benchmark.distributed import PipelineBenchmark, PipelineCase
from launcher.config.parallel.data_parallel import Single
from launcher.config.parallel.pipeline import Pipeline
from launcher.config.run import Run
from launcher.verification.forked_ranks import preload_modules

if TYPE_CHECKING:
    from launcher.benchmarks.harness import CaseRun
    from launcher.engines.context import Context


def run_pipeline_benchmark(benchmark: PipelineBenchmark, context: Context) -> BenchmarkResults | None:
    """Measure all pipelines in turn, on as many ranks as each has stages."""
    cases = {one.name: _make_case(benchmark, one, context.run) for one in benchmark.pipelines}
    if benchmark.needs_model:
        preload_modules(context, deepspeed=False)
    found = run_interleaved(cases, repeats=benchmark.repeats, limit_s=benchmark.case_timeout_s, context=context)
    return pipeline_report(benchmark, found) if context.is_main else None


def _make_case(benchmark: PipelineBenchmark, one: PipelineCase, run: Run) -> DistributedCase:

    if one.passes == "sleep":
        work = partial(run_sleeping_stages, pipelined=one, unit_s=benchmark.unit_ms / 1000, warmup=benchmark.warmup)
        return DistributedCase(run=run, world_size=one.stages, work=work, fold=partial(fold_ranks, tokens=0))
    job = replace(run.batched_job, micro_batch=benchmark.batch_size // one.micro_batches)
    parallel = Pipeline(stages=one.stages, schedule=one.schedule) if one.stages > 1 else Single()
    return DistributedCase(
        run=replace(run, job=job, parallel=parallel),
        world_size=one.stages,
        work=partial(run_model_stages, trains=one.work == "train", warmup=benchmark.warmup),
        fold=partial(fold_ranks, tokens=benchmark.batch_size * benchmark.sequence_length),
    )


@dataclass(frozen=True, kw_only=True)
class _FoundCase:
    """One pipeline with what was found in all rounds."""

    pipelined: PipelineCase
    idle: float | None
    theory: float | None
    live: list[int] | None
    """Most micro-batches' activations held at once, by rank, all its chunks together."""
    tokens_per_s: float | None
    speedup: float | None
    """Throughput as a multiple of that of one stage, paired by round."""


def pipeline_report(benchmark: PipelineBenchmark, found: Mapping[str, Sequence[CaseRun]]) -> BenchmarkResults:
    """Return the findings of all pipelines.

    Raises:
        JobError: a formula disagrees with the schedule that torch made, so that one of them is not what it should be.
    """
    rows = [_row(one, found) for one in benchmark.pipelines]
    cases = [
        BenchmarkCase(
            name=name, samples={key: tuple(taken.numbers[key] for taken in rounds) for key in rounds[0].numbers}
        )
        for name, rounds in found.items()
    ]
    return BenchmarkResults(
        benchmark=benchmark,
        cases=cases,
        facts={row.pipelined.name: _facts(row) for row in rows},
        findings=tuple(_findings(benchmark, rows)),
        metrics=dict(_metrics(rows)),
        tables=tuple(_table(rows)),
    )


def _row(one: PipelineCase, found: Mapping[str, Sequence[CaseRun]]) -> _FoundCase:
    rounds = found[one.name]
    speeds = [taken.numbers.get("tokens_per_s") for taken in rounds]
    idle = [taken.numbers["idle_share"] for taken in rounds] if one.stages > 1 else None
    pairs: list[float] = []
    if one.passes == "model" and one.stages > 1:
        single = PipelineCase(
            passes="model", work=one.work, schedule="gpipe", stages=1, micro_batches=one.micro_batches
        )
        alone = [taken.numbers["tokens_per_s"] for taken in found[single.name]]
        pairs = [speed / base for speed, base in zip(speeds, alone, strict=True) if speed is not None]
    sleeps = one.passes == "sleep"
    order = rounds[-1].answers[0]["order"] if sleeps else {}
    live = [max(taken.answers[rank]["live"] for taken in rounds) for rank in range(one.stages)] if sleeps else None
    return _FoundCase(
        pipelined=one,
        idle=statistics.median(idle) if idle else None,
        theory=theory_of(one, order) if one.stages > 1 else None,
        live=live if one.work == "train" else None,
        tokens_per_s=statistics.median(speed for speed in speeds if speed is not None) if not sleeps else None,
        speedup=statistics.median(pairs) if pairs else None,
    )


def _facts(row: _FoundCase) -> dict[str, Any]:
    one = row.pipelined
    return {
        **{name: getattr(one, name) for name in ("passes", "work", "schedule", "stages", "micro_batches")},
        **{name: getattr(row, name) for name in ("idle", "theory", "live", "tokens_per_s", "speedup")},
        "formula_holds": one.stages > 1 and formula_of(one) is not None,
    }


def _metrics(rows: Sequence[_FoundCase]) -> Iterator[tuple[str, float]]:
    for row in rows:
        for name in ("idle", "theory", "tokens_per_s", "speedup"):
            value = getattr(row, name)
            if value is not None:
                yield f"{row.pipelined.name}/{name}", value


def _findings(benchmark: PipelineBenchmark, rows: Sequence[_FoundCase]) -> Iterator[str]:
    """Yield the differences of idle shares from theory, and the speedup of stages."""
    for passes in benchmark.passes:
        measured = [(row.pipelined, row.idle, row.theory) for row in rows if row.pipelined.passes == passes]
        apart = [
            (abs(idle - theory), one, idle, theory)
            for one, idle, theory in measured
            if idle is not None and theory is not None
        ]
        if apart:
            points, one, idle, theory = max(apart, key=lambda entry: entry[0])
            yield (
                f"stages of {'the model' if passes == 'model' else 'a known time'}: idle shares within "
                f"{100 * points:.1f} points of theory in all {len(apart)} cases; the farthest is {one.description}: "
                f"{idle:.1%}, theory {theory:.1%}"
            )
    for row in rows:
        if row.speedup is not None and row.idle is not None:
            yield (
                f"{row.pipelined.description}: {row.tokens_per_s:,.0f} tokens/s, {row.speedup:.2f} times one stage; "
                f"idle {row.idle:.1%}"
            )
    cores, most = len(os.sched_getaffinity(0)), max(benchmark.stages)
    if benchmark.needs_model and most > cores:
        yield f"{most} stages share {cores} cores: they keep each other waiting while they compute"
    yield from (f"left out: {what}: {why}" for what, why in benchmark.left_out.items())


def _table(rows: Sequence[_FoundCase]) -> Iterator[str]:
    """Yield a Markdown table, a row for each pipeline."""
    heads = ("stages", "work", "schedule", "number", "micro-batches", "idle, theory", "idle, measured")
    yield f"| {' | '.join((*heads, 'live activations by rank', 'tokens/s', 'against one stage'))} |"
    yield "|---" * (len(heads) + 3) + "|"
    for row in rows:
        one = row.pipelined
        theory = "" if row.theory is None else f"{row.theory:.1%}{'' if formula_of(one) is not None else ' *'}"
        cells = (
            *(one.passes, one.work, one.schedule if one.has_schedule else "", str(one.stages), str(one.micro_batches)),
            theory,
            "" if row.idle is None else f"{row.idle:.1%}",
            "" if row.live is None else ", ".join(map(str, row.live)),
            "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
            "" if row.speedup is None else f"{row.speedup:.2f}",
        )
        yield f"| {' | '.join(cells)} |"
    if any(row.theory is not None and formula_of(row.pipelined) is None for row in rows):
        yield ""
        yield "\\* too few micro-batches to fill the pipeline: the longest path through the schedule's order"
