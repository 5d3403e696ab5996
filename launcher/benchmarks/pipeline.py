"""Pipelines: the share of time that ranks wait against theory, and throughput against one stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.benchmarks.base import Benchmark
from launcher.benchmarks.pipelined import FORWARD, Pass, Pipelined, Work, baselines
from launcher.errors import ConfigError
from launcher.parallel.pipeline import Pipeline, ScheduleName
from launcher.parallel.replicated import Single

if TYPE_CHECKING:
    from launcher.benchmarks.ranked import RankedCase
    from launcher.benchmarks.results import Results
    from launcher.config import Run
    from launcher.context import Context


@dataclass(frozen=True, kw_only=True)
class PipelineBenchmark(Benchmark):
    """Micro-batches through stages on the run's ranks, in training and in forward passes alone.

    Stages that sleep take a known time on any machine, so they show the schedule; stages of the run's model show what
    it brings on this one.
    """

    kind: ClassVar[str] = "pipeline"
    headline: ClassVar[tuple[str, ...]] = ("stages", "micro_batches", "schedules", "passes", "work")
    max_ranks: ClassVar[int | None] = None
    how: ClassVar[str] = "on forks of the run's ranks"

    passes: tuple[Pass, ...] = ("sleep", "model")
    """What a pass through a stage is: ``sleep`` takes a known time, ``model`` computes layers of the run's model."""

    work: tuple[Work, ...] = ("train", "infer")
    """Whole optimiser steps, and forward passes alone."""

    stages: tuple[int, ...] = (2,)
    """Ranks that a pipeline is made of; the run has as many as the longest takes."""

    micro_batches: tuple[int, ...] = (2, 4, 8)
    """Parts that a step's sequences go through the pipeline in."""

    schedules: tuple[ScheduleName, ...] = ("gpipe", "1f1b")
    """Orders of forward and backward passes in training, as parallel.schedule has them."""

    unit_ms: float = 100.0
    """How long a rank that sleeps takes for a micro-batch's forward pass; the gradients of its input and of its weight
    take as long each. A busy machine wakes a sleeper late: give it a longer unit."""

    batch: int = 16
    """Sequences in a step of the model, all micro-batches together."""

    sequence: int = 64
    """Tokens in each of them."""

    case_timeout_s: float = 600.0
    """Time that one case gets, from building its stages to their last pass."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse pipelines that are none, and micro-batches that are not alike."""
        yield from super().problems()
        yield from self.below(1, "batch", "case_timeout_s")
        yield from self.below(2, "sequence")
        for name, least in (("stages", 2), ("micro_batches", 1), ("schedules", ""), ("passes", ""), ("work", "")):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                yield self.refuse(name, "names nothing, or something twice", f"leave benchmark.{name} out")
            elif isinstance(least, int) and min(values) < least:
                yield self.refuse(name, f"must each be at least {least}", f"leave benchmark.{name} out")
        if self.unit_ms <= 0:
            yield self.refuse("unit_ms", "must be above 0", "set benchmark.unit_ms=100")
        uneven = [number for number in self.micro_batches if number > 0 and self.batch % number]
        if uneven and "model" in self.passes:
            why = f"{self.batch} sequences do not make {uneven[0]} micro-batches of one size"
            yield self.refuse("batch", why, f"set benchmark.batch={-(-self.batch // uneven[0]) * uneven[0]}")

    @property
    def needs_model(self) -> bool:  # type: ignore[override]
        """Whether some stages are the model's."""
        return "model" in self.passes

    @property
    def train_options(self) -> Mapping[str, Any]:
        """Steps of the whole batch; each case cuts it up."""
        sizes = {"micro_batch": self.batch, "global_batch": self.batch, "sequence_length": self.sequence}
        return {**sizes, "steps": self.warmup + 1}

    @property
    def _all(self) -> list[Pipelined]:
        """Every combination that was asked for, one stage of the model first in each kind of work."""
        found: list[Pipelined] = []
        for passes in self.passes:
            for work in self.work:
                found += baselines(work, self.micro_batches) if passes == "model" else ()
                found += [
                    Pipelined(passes=passes, work=work, schedule=schedule, stages=stages, micro_batches=number)
                    for stages in self.stages
                    for schedule in (self.schedules if work == "train" else (FORWARD,))
                    for number in self.micro_batches
                ]
        return found

    @property
    def pipelines(self) -> list[Pipelined]:
        """What is measured."""
        return [one for one in self._all if one.misfit is None]

    @property
    def left_out(self) -> dict[str, str]:
        """What cannot be, each with the reason."""
        return {one.in_words: one.misfit for one in self._all if one.misfit is not None}

    def refusals(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Refuse another number of ranks than stages, and models that cannot be cut so."""
        if world_size != max(self.stages):
            why = f"benchmark.stages={max(self.stages)} takes as many ranks"
            yield ConfigError("backend.ranks", world_size, why=why, fix=f"set backend.ranks={max(self.stages)}")
        if not any(one.stages > 1 for one in self.pipelines):
            reason = next(iter(self.left_out.items()))
            yield self.refuse("micro_batches", f"{reason[0]}: {reason[1]}", "set benchmark.schedules=[gpipe]")
        if not self.needs_model:
            return
        shape = run.model.shape()
        if shape is None:
            why = "its sizes are known only once it is downloaded"
            yield ConfigError("model", run.model.kind, why=why, fix="choose another model, or benchmark.passes=[sleep]")
            return
        if self.sequence > shape.context:
            why = f"{run.model.name} takes at most {shape.context} tokens"
            yield self.refuse("sequence", why, f"set benchmark.sequence={shape.context}")
        wanted = {(one.schedule, one.stages) for one in self.pipelines if one.passes == "model" and one.stages > 1}
        for schedule, stages in sorted(wanted):
            pipeline = Pipeline(schedule=schedule, stages=stages)
            for error in pipeline.refusals(stages, run.precision, optimizer=run.optimizer, shape=shape):
                yield self.refuse("stages", f"{schedule}: {error.why}", "take fewer, or benchmark.passes=[sleep]")

    @property
    def num_measurements(self) -> int:
        """Each pipeline in each round."""
        return self.repeats * len(self.pipelines)

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield what stages do, the pipelines, and what cannot be."""
        if "sleep" in self.passes:
            yield "stages that sleep", f"{self.unit_ms:g} ms for a forward pass, twice that for a backward pass"
        if "model" in self.passes:
            size = f"{self.batch} sequences of {self.sequence} tokens"
            yield "stages of", f"{run.model.name}, precision={run.precision.kind}: {size}, compared with one stage"
        yield "pipelines", f"{len(self.pipelines)} in each of {self.repeats} rounds"
        if self.left_out:
            yield "left out", "; ".join(f"{what}: {why}" for what, why in self.left_out.items())

    def run(self, context: Context) -> Results | None:
        """Measure all pipelines in turn, on as many ranks as each has stages."""
        from launcher.benchmarks.ranked import take_in_turn
        from launcher.benchmarks.report_of_pipeline import report
        from launcher.verification.preload import preload

        cases = {one.name: self._case(one, context.run) for one in self.pipelines}
        if self.needs_model:
            preload(context, deepspeed=False)
        found = take_in_turn(cases, repeats=self.repeats, limit_s=self.case_timeout_s, context=context)
        return report(self, found) if context.is_main else None

    def _case(self, one: Pipelined, run: Run) -> RankedCase:
        from launcher.benchmarks.ranked import RankedCase
        from launcher.benchmarks.sleepers import sleep
        from launcher.benchmarks.stages import compute, fold

        if one.passes == "sleep":
            work = partial(sleep, pipelined=one, unit_s=self.unit_ms / 1000, warmup=self.warmup)
            return RankedCase(run=run, world_size=one.stages, work=work, fold=partial(fold, tokens=0))
        job = replace(run.batched_job, micro_batch=self.batch // one.micro_batches)
        parallel = Pipeline(stages=one.stages, schedule=one.schedule) if one.stages > 1 else Single()
        return RankedCase(
            run=replace(run, job=job, parallel=parallel),
            world_size=one.stages,
            work=partial(compute, learns=one.work == "train", warmup=self.warmup),
            fold=partial(fold, tokens=self.batch * self.sequence),
        )
