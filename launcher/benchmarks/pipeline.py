"""The pipeline benchmark: stages that sleep, the run's model in stages, and the report."""

from __future__ import annotations

import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage

from launcher.benchmarks.harness import DistributedCase, run_interleaved
from launcher.benchmarks.instruments import random_batches
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
from launcher.config.benchmark.distributed import PipelineBenchmark, PipelineCase
from launcher.config.parallel.data_parallel import Single
from launcher.config.parallel.pipeline import Pipeline, rank_of_chunk
from launcher.config.run import Run
from launcher.engines.base import make_engine
from launcher.engines.distributed import barrier, connect, disconnect
from launcher.engines.pipeline.schedules import PipelineForward, chunks_of_rank, make_schedule
from launcher.errors import JobError
from launcher.profiling.performance import StepClock
from launcher.verification.forked_ranks import preload_modules

if TYPE_CHECKING:
    from launcher.benchmarks.harness import CaseRun
    from launcher.engines.context import Context
    from launcher.verification.forked_ranks import CaseAnswer


SchedulePass = tuple[int, str, int]
"""Stretch, kind (F forward, B backward, I and W its two halves), micro-batch."""


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
    job = replace(run.batched_job, micro_batch=benchmark.batch // one.micro_batches)
    parallel = Pipeline(stages=one.stages, schedule=one.schedule) if one.stages > 1 else Single()
    return DistributedCase(
        run=replace(run, job=job, parallel=parallel),
        world_size=one.stages,
        work=partial(run_model_stages, learns=one.work == "train", warmup=benchmark.warmup),
        fold=partial(fold_ranks, tokens=benchmark.batch * benchmark.sequence),
    )


def longest_path(order: Mapping[int, Sequence[SchedulePass]], *, stretches: int) -> float:
    """Return the idle share of an order of passes on each rank, when each starts as soon as what it needs is there."""
    done: dict[tuple[str, int, int], float] = {}
    clock, left = dict.fromkeys(order, 0.0), {rank: list(passes) for rank, passes in order.items()}
    work = sum(_length(kind) for passes in order.values() for _, kind, _ in passes)
    while any(left.values()):
        before = len(done)
        for rank, passes in left.items():
            while passes and all(need in done for need in _needs(passes[0], stretches)):
                stretch, kind, number = passes.pop(0)
                ready = max([done[need] for need in _needs((stretch, kind, number), stretches)], default=0.0)
                clock[rank] = max(clock[rank], ready) + _length(kind)
                done["gradient" if kind in "BI" else kind, stretch, number] = clock[rank]
        assert len(done) > before, "an order that waits for itself"
    return 1 - work / (len(order) * max(clock.values()))


def _length(kind: str) -> float:
    return 2.0 if kind == "B" else 1.0


def _needs(one: SchedulePass, stretches: int) -> list[tuple[str, int, int]]:
    stretch, kind, number = one
    if kind == "F":
        return [("F", stretch - 1, number)] if stretch else []
    if kind == "W":
        return [("gradient", stretch, number)]
    behind = [("gradient", stretch + 1, number)] if stretch < stretches - 1 else []
    return [("F", stretch, number), *behind]


_CPU = torch.device("cpu")


def run_sleeping_stages(context: Context, *, pipelined: PipelineCase, unit_s: float, warmup: int) -> CaseAnswer:
    """Send micro-batches through stages that sleep; return seconds from start to end, busy ones, and what was held.

    Args:
        context: of this rank, one stage of the pipeline.
        pipelined: what to send through what.
        unit_s: a rank's time for the forward pass of a micro-batch, all its stretches together.
        warmup: times everything is sent through first, beside one in which nobody sleeps and the ranks connect.
    """
    torch.set_num_threads(1)
    connect(context, _CPU)
    meter = IdleMeter()
    passes, order = _training(pipelined, meter) if pipelined.work == "train" else _forward(pipelined, meter)
    for number in range(warmup + 2):
        meter.unit_s = unit_s / pipelined.chunks if number else 0.0
        barrier()
        meter.busy_s = meter.live = meter.most_live = 0
        started = time.perf_counter()
        passes()
        elapsed_s = time.perf_counter() - started
    barrier()
    disconnect()
    return {
        "elapsed_s": elapsed_s,
        "pass_s": elapsed_s,
        "busy_s": meter.busy_s,
        "live": meter.most_live,
        "order": order,
    }


class IdleMeter:
    """What one rank does in one step."""

    def __init__(self) -> None:
        self.unit_s, self.busy_s, self.live, self.most_live = 0.0, 0.0, 0, 0

    def work(self) -> None:
        """Take a known time."""
        started = time.perf_counter()
        time.sleep(self.unit_s)
        self.busy_s += time.perf_counter() - started

    def hold(self, activation: Tensor) -> None:
        """Count an activation until nothing refers to it."""
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        weakref.finalize(activation, self._let_go)

    def _let_go(self) -> None:
        self.live -= 1


class _OfInput(torch.autograd.Function):  # type: ignore[misc]
    """The part of a stage whose backward pass gives the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, meter: IdleMeter) -> Tensor:
        activation = hidden.clone()
        meter.work()
        meter.hold(activation)
        ctx.save_for_backward(activation)
        ctx.meter = meter
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        ctx.meter.work()
        return gradients[0].clone(), None


class _OfWeight(torch.autograd.Function):  # type: ignore[misc]
    """The part of a stage whose backward pass gives the gradient of its weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, meter: IdleMeter) -> Tensor:
        ctx.meter = meter
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        ctx.meter.work()
        return gradients[0].clone(), None


class SleepingStage(nn.Module):  # type: ignore[misc]
    """A stage that takes the same time for a forward pass, for the gradient of its input and for that of its weight."""

    def __init__(self, meter: IdleMeter, *, last: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.last = last
        self._meter = meter

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what came in, later."""
        kept = _OfInput.apply(hidden, self._meter)
        return kept + _OfWeight.apply(self.weight, self._meter)


def _own(pipelined: PipelineCase, meter: IdleMeter) -> dict[int, SleepingStage]:
    count = pipelined.stages * pipelined.chunks
    numbers = chunks_of_rank(pipelined.schedule, rank=dist.get_rank(), ranks=pipelined.stages, chunks=pipelined.chunks)
    return {number: SleepingStage(meter, last=number == count - 1) for number in numbers}


def _training(pipelined: PipelineCase, meter: IdleMeter) -> tuple[Callable[[], None], dict[int, list[SchedulePass]]]:
    """Return what takes forward and backward passes of a step, and the order in which ranks take theirs."""
    own, meta = _own(pipelined, meter), torch.empty(1, 1, device="meta", requires_grad=True)
    schedule = make_schedule(
        pipelined.schedule,
        [(number, sleeper, (meta, meta)) for number, sleeper in own.items()],
        count=pipelined.stages * pipelined.chunks,
        micro_batches=pipelined.micro_batches,
        loss=lambda output, target: (output * target).sum(),
        device=_CPU,
        group=dist.group.WORLD,
    )
    ones = torch.ones(pipelined.micro_batches, 1)

    def step() -> None:
        schedule.step(*([ones.requires_grad_()] if 0 in own else []), target=ones.detach())

    return step, order_of(schedule)


def _forward(pipelined: PipelineCase, meter: IdleMeter) -> tuple[Callable[[], None], dict[int, list[SchedulePass]]]:
    """Return what takes the forward passes alone, by what evaluation and generation go through."""
    own: Any = _own(pipelined, meter)  # to the relay they are stretches
    count = pipelined.stages * pipelined.chunks
    owners = [rank_of_chunk(pipelined.schedule, number, ranks=pipelined.stages) for number in range(count)]
    relay = PipelineForward(own, owners=owners, width=1, device=_CPU, group=dist.group.WORLD)
    tokens = [torch.ones(1, 1)] * pipelined.micro_batches

    def forward() -> None:
        with torch.no_grad():
            relay.through(tokens, lambda stretch, state, _: stretch(state.view(1, 1, 1)))

    return forward, {}


def order_of(schedule: Any) -> dict[int, list[SchedulePass]]:
    """Return the passes of each rank, where torch lists them rightly: it does for schedules of several stretches."""
    if len(getattr(schedule, "_stages", ())) < 2:
        return {}
    return {
        rank: [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in actions if a is not None]
        for rank, actions in schedule.pipeline_order.items()
    }


_BACKWARD = ("backward_one_chunk", "backward_weight_one_chunk")


def run_model_stages(context: Context, *, learns: bool, warmup: int) -> CaseAnswer:
    """Take a step of the run, or its forward passes alone; return its seconds and those in which this rank computed.

    Args:
        context: of this rank, one stage of the pipeline or the one process that does all.
        learns: whether to take the whole step.
        warmup: times it is done first.
    """
    cuda = torch.cuda.is_available()
    clock = StepClock(context.heartbeat, cuda=cuda)
    with make_engine(context, clock) as engine:
        stretches = engine.module if isinstance(engine.module, nn.ModuleList) else ()
        meter = BusyMeter(stretches, device=engine.device)
        batches = random_batches(context)
        for _ in range(warmup + 1):
            barrier()
            clock.take()
            meter.busy_s, started = 0.0, _now(engine.device)
            if learns:
                engine.step(batches, lr=context.run.optimizer.lr)
            else:
                engine.loss_of(batches)
            elapsed_s = _now(engine.device) - started
        passes_s = clock.take().get("pipeline", elapsed_s)  # without the update, which no schedule orders
        barrier()
    return {"elapsed_s": elapsed_s, "pass_s": passes_s, "busy_s": meter.busy_s}


def fold_ranks(answers: Sequence[CaseAnswer], *, tokens: int) -> dict[str, float]:
    """Return what the ranks of a case found together: seconds, tokens a second, the share of time that they waited.

    Args:
        answers: by rank.
        tokens: that went through; 0 where stages only slept.
    """
    elapsed_s, passes_s = (max(answer[key] for answer in answers) for key in ("elapsed_s", "pass_s"))
    found = {"step_s": elapsed_s}
    if len(answers) > 1:
        found["idle_share"] = 1 - sum(answer["busy_s"] for answer in answers) / (len(answers) * passes_s)
    if tokens:
        found["tokens_per_s"] = tokens / elapsed_s
    return found


class BusyMeter:
    """Counts the seconds in which stretches of a pipeline go forward or backward, and not those that they wait.

    It changes torch's stages for good: a process that has one is of no other use.
    """

    def __init__(self, stretches: Iterable[nn.Module], *, device: torch.device) -> None:
        self.busy_s, self._device, self._started = 0.0, device, 0.0
        for stretch in stretches:
            stretch.register_forward_pre_hook(lambda *_: self._begin())
            stretch.register_forward_hook(lambda *_: self._end())
        for name in _BACKWARD:
            setattr(PipelineStage, name, self._timed(getattr(PipelineStage, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self._begin()
            try:
                return function(*args, **options)
            finally:
                self._end()

        return timed

    def _begin(self) -> None:
        self._started = _now(self._device)

    def _end(self) -> None:
        self.busy_s += _now(self._device) - self._started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


_SAME = 1e-9


@dataclass(frozen=True, kw_only=True)
class _FoundCase:
    """One pipeline with what was found in all rounds."""

    pipelined: PipelineCase
    idle: float | None
    theory: float | None
    live: list[int] | None
    """Most micro-batches' activations held at once, by rank, all its stretches together."""
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
        said=tuple(_said(benchmark, rows)),
        metrics=dict(_metrics(rows)),
        tables=tuple(_table(rows)),
    )


def theory_of(one: PipelineCase, order: Mapping[Any, Any]) -> float | None:
    """Return the idle share by formula, or by the longest path through the schedule's order where no formula holds.

    Raises:
        JobError: both are there and differ.
    """
    by_path = longest_path(order, stretches=one.stages * one.chunks) if order else None
    if by_path is not None and one.formula is not None and abs(by_path - one.formula) > _SAME:
        raise JobError(f"{one.in_words}: idle {one.formula:.2%} by the formula, {by_path:.2%} by the longest path")
    return one.formula if by_path is None else by_path


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
        "formula_holds": one.stages > 1 and one.formula is not None,
    }


def _metrics(rows: Sequence[_FoundCase]) -> Iterator[tuple[str, float]]:
    for row in rows:
        for name in ("idle", "theory", "tokens_per_s", "speedup"):
            value = getattr(row, name)
            if value is not None:
                yield f"{row.pipelined.name}/{name}", value


def _said(benchmark: PipelineBenchmark, rows: Sequence[_FoundCase]) -> Iterator[str]:
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


def _table(rows: Sequence[_FoundCase]) -> Iterator[str]:
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
