"""Benchmarks of several ranks: collectives and pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from launcher.config.parallel.pipeline import Pipeline, PipelineScheduleName, micro_batch_choices
from launcher.config.run import COMPUTING_GROUPS, Benchmark, Run
from launcher.errors import ConfigError
from launcher.utils.text import bytes_text

CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"]
VALUE_BYTES = 4
"""Messages are made of fp32."""


@dataclass(frozen=True, kw_only=True)
class CollectivesBenchmark(Benchmark):
    """Every collective at every size on all ranks; results are checked.

    NCCL between GPUs, Gloo between CPUs.
    """

    kind: ClassVar[str] = "collectives"
    summary_fields: ClassVar[tuple[str, ...]] = ("smallest_bytes", "largest_bytes", "factor")
    max_ranks: ClassVar[int | None] = None
    isolation: ClassVar[str] = "all in turn, in the run's own ranks; a time is that of the slowest rank"

    collectives: tuple[CollectiveName, ...] = get_args(CollectiveName)
    """Collectives to measure, on fp32 values."""

    smallest_bytes: int = 1024
    """Size of the smallest message; nccl-tests' definition of size."""

    largest_bytes: int = 64 * 2**20
    """Size of the largest message."""

    factor: int = 4
    """From one size to the next."""

    duration_s: float = 0.2
    """Seconds to repeat each collective at each size in each round; 3 times at least."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject sizes and times that measure nothing."""
        yield from super().validate()
        yield from self.validate_minimum(VALUE_BYTES, "smallest_bytes")
        yield from self.validate_minimum(2, "factor")
        if self.largest_bytes < self.smallest_bytes:
            why = f"is below benchmark.smallest_bytes={self.smallest_bytes}"
            yield self.error("largest_bytes", why, f"set benchmark.largest_bytes={self.smallest_bytes}")
        if self.duration_s <= 0:
            yield self.error("duration_s", "must be above 0", "set benchmark.duration_s=0.2")
        if not self.collectives or len(set(self.collectives)) < len(self.collectives):
            yield self.error("collectives", "is empty or has duplicates", "leave benchmark.collectives out")

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject one rank, and messages that have no value for each rank."""
        if world_size < 2:
            why = "a collective needs at least 2 ranks"
            also = " parallel=ddp" if run.parallel.max_ranks == 1 else ""
            yield ConfigError("backend.ranks", world_size, why=why, fix=f"set backend.ranks=2{also}")
        elif self.smallest_bytes < VALUE_BYTES * world_size:
            least = VALUE_BYTES * world_size
            why = f"{world_size} ranks x {VALUE_BYTES} bytes = {least}"
            yield self.error("smallest_bytes", why, f"set benchmark.smallest_bytes={least}")

    @property
    def sizes(self) -> list[int]:
        """Sizes of messages in bytes, from the smallest on."""
        sizes = [self.smallest_bytes]
        while sizes[-1] * self.factor <= self.largest_bytes:
            sizes.append(sizes[-1] * self.factor)
        return sizes

    @property
    def num_measurements(self) -> int:
        """Each collective at each size in each round."""
        return self.repeats * len(self.sizes) * len(self.collectives)

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the collectives and the sizes."""
        yield "collectives", ", ".join(self.collectives)
        yield "messages", ", ".join(map(bytes_text, self.sizes))


PassKind = Literal["sleep", "model"]
WorkKind = Literal["train", "infer"]
FORWARD_SCHEDULE: PipelineScheduleName = "gpipe"
"""Schedule that lays out chunks when there are forward passes alone.
They go through stages in one order whatever the schedule is."""


@dataclass(frozen=True, kw_only=True)
class PipelineCase:
    """One pipeline at one kind of work; one stage is the process that it is compared with."""

    passes: PassKind
    work: WorkKind
    schedule: PipelineScheduleName
    stages: int
    micro_batches: int

    @property
    def name(self) -> str:
        """Return the name of the case in metrics, tables and files."""
        parts = [self.passes, self.work, *([self.schedule] if self.has_schedule else [])]
        return "_".join([*parts, f"{self.stages}_stages" if self.stages > 1 else "one_stage", f"{self.micro_batches}"])

    @property
    def has_schedule(self) -> bool:
        """Whether its schedule has a say."""
        return self.work == "train" and self.stages > 1

    @property
    def description(self) -> str:
        """Return a description for the plan."""
        what = self.schedule if self.has_schedule else ("forward passes" if self.work == "infer" else "training")
        stages = f"{self.stages} stages" if self.stages > 1 else "one stage"
        return f"{what}, {stages}, {self.micro_batches} micro-batches"

    @property
    def num_chunks(self) -> int:
        """Model chunks on each rank."""
        return Pipeline(schedule=self.schedule).num_chunks

    def validate(self) -> Iterator[str]:
        """Yield why the schedule cannot run with this number of micro-batches."""
        fitting = micro_batch_choices(self.schedule, stages=self.stages, wanted=self.micro_batches)
        if self.micro_batches not in fitting:
            yield f"the schedule supports {' or '.join(map(str, fitting))} micro-batches there"


def single_stage_cases(work: WorkKind, micro_batches: tuple[int, ...]) -> Iterator[PipelineCase]:
    """Yield one process at the same work, in as many micro-batches."""
    for number in micro_batches:
        yield PipelineCase(passes="model", work=work, schedule=FORWARD_SCHEDULE, stages=1, micro_batches=number)


@dataclass(frozen=True, kw_only=True)
class PipelineBenchmark(Benchmark):
    """Micro-batches through stages on the run's ranks, in training and in forward passes alone.

    Stages that sleep take a known time on any machine, so they show the schedule; stages of the run's model show what
    it brings on this one.
    """

    kind: ClassVar[str] = "pipeline"
    summary_fields: ClassVar[tuple[str, ...]] = ("stages", "micro_batches", "schedules", "passes", "work")
    max_ranks: ClassVar[int | None] = None
    isolation: ClassVar[str] = "on forks of the run's ranks"

    passes: tuple[PassKind, ...] = ("sleep", "model")
    """Kinds of stages: ``sleep`` takes a known time, ``model`` computes the model's layers."""

    work: tuple[WorkKind, ...] = ("train", "infer")
    """Whole optimizer steps, and forward passes alone."""

    stages: tuple[int, ...] = (2,)
    """Ranks that a pipeline is made of; the run has as many as the longest takes."""

    micro_batches: tuple[int, ...] = (2, 4, 8)
    """Parts that a step's sequences go through the pipeline in."""

    schedules: tuple[PipelineScheduleName, ...] = ("gpipe", "1f1b")
    """Orders of forward and backward passes in training, as parallel.schedule has them."""

    unit_ms: float = 100.0
    """Milliseconds that a sleeping rank takes for a micro-batch's forward pass.
    The gradients of its input and of its weight take as long each. A busy machine wakes a sleeper late: use a longer
    unit there."""

    batch_size: int = 16
    """Sequences in a step of the model, all micro-batches together."""

    sequence_length: int = 64
    """Tokens in each of them."""

    case_timeout_s: float = 600.0
    """Time that one case gets, from building its stages to their last pass."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject pipelines that are none, and micro-batches that are not alike."""
        yield from super().validate()
        yield from self.validate_minimum(1, "batch_size", "case_timeout_s")
        yield from self.validate_minimum(2, "sequence_length")
        for name, least in (("stages", 2), ("micro_batches", 1), ("schedules", ""), ("passes", ""), ("work", "")):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                yield self.error(name, "is empty or has duplicates", f"leave benchmark.{name} out")
            elif isinstance(least, int) and min(values) < least:
                yield self.error(name, f"must each be at least {least}", f"leave benchmark.{name} out")
        if self.unit_ms <= 0:
            yield self.error("unit_ms", "must be above 0", "set benchmark.unit_ms=100")
        uneven = [number for number in self.micro_batches if number > 0 and self.batch_size % number]
        if uneven and "model" in self.passes:
            why = f"{self.batch_size} sequences cannot be split into {uneven[0]} micro-batches of equal size"
            yield self.error(
                "batch_size", why, f"set benchmark.batch_size={-(-self.batch_size // uneven[0]) * uneven[0]}"
            )

    @property
    def used_groups(self) -> frozenset[str]:  # type: ignore[override]
        """Those of training, where stages of the model are measured."""
        return COMPUTING_GROUPS - {"schedule"} if self.needs_model else frozenset()

    @property
    def needs_model(self) -> bool:  # type: ignore[override]
        """Whether some stages are the model's."""
        return "model" in self.passes

    @property
    def train_options(self) -> Mapping[str, Any]:
        """Steps of the whole batch; each case cuts it up."""
        sizes = {
            "micro_batch": self.batch_size,
            "global_batch": self.batch_size,
            "sequence_length": self.sequence_length,
        }
        return {**sizes, "steps": self.warmup + 1}

    @property
    def _all(self) -> list[PipelineCase]:
        """Every combination that was asked for, one stage of the model first in each kind of work."""
        found: list[PipelineCase] = []
        for passes in self.passes:
            for work in self.work:
                found += single_stage_cases(work, self.micro_batches) if passes == "model" else ()
                found += [
                    PipelineCase(passes=passes, work=work, schedule=schedule, stages=stages, micro_batches=number)
                    for stages in self.stages
                    for schedule in (self.schedules if work == "train" else (FORWARD_SCHEDULE,))
                    for number in self.micro_batches
                ]
        return found

    @property
    def pipelines(self) -> list[PipelineCase]:
        """Return the pipelines to measure."""
        return [one for one in self._all if not any(one.validate())]

    @property
    def left_out(self) -> dict[str, str]:
        """Return the pipelines that cannot be measured, each with the reason."""
        return {one.description: why for one in self._all for why in one.validate()}

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject another number of ranks than stages, and models that cannot be cut so."""
        if world_size != max(self.stages):
            why = f"benchmark.stages={max(self.stages)} needs as many ranks"
            yield ConfigError("backend.ranks", world_size, why=why, fix=f"set backend.ranks={max(self.stages)}")
        if not any(one.stages > 1 for one in self.pipelines):
            reason = next(iter(self.left_out.items()))
            yield self.error("micro_batches", f"{reason[0]}: {reason[1]}", "set benchmark.schedules=[gpipe]")
        if not self.needs_model:
            return
        shape = run.model.shape()
        if shape is None:
            why = "its sizes are known only once it is downloaded"
            yield ConfigError("model", run.model.kind, why=why, fix="choose another model, or benchmark.passes=[sleep]")
            return
        yield from run.model.validate_length(benchmark__sequence_length=self.sequence_length)
        wanted = {(one.schedule, one.stages) for one in self.pipelines if one.passes == "model" and one.stages > 1}
        for schedule, stages in sorted(wanted):
            pipeline = Pipeline(schedule=schedule, stages=stages)
            for error in pipeline.validate_run(stages, run.precision, optimizer=run.optimizer, shape=shape):
                yield self.error("stages", f"{schedule}: {error.why}", "set fewer, or benchmark.passes=[sleep]")

    @property
    def num_measurements(self) -> int:
        """Each pipeline in each round."""
        return self.repeats * len(self.pipelines)

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the stages' work, the pipelines, and those left out."""
        if "sleep" in self.passes:
            yield "stages that sleep", f"{self.unit_ms:g} ms for a forward pass, twice that for a backward pass"
        if "model" in self.passes:
            size = f"{self.batch_size} sequences of {self.sequence_length} tokens"
            yield "stages of", f"{run.model.name}, precision={run.precision.kind}: {size}, compared with one stage"
        yield "pipelines", f"{len(self.pipelines)} in each of {self.repeats} rounds"
        if self.left_out:
            yield "left out", "; ".join(f"{what}: {why}" for what, why in self.left_out.items())
