"""Pipelines to measure: stages that sleep a known time, and stages of the run's model."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage

from launcher.benchmarks.instruments import random_batches
from launcher.benchmarks.pipeline_bubble import SchedulePass
from launcher.config.benchmark.distributed import PipelineCase
from launcher.config.parallel.pipeline import rank_of_chunk
from launcher.engines.base import make_engine
from launcher.engines.distributed import barrier, connect, disconnect
from launcher.engines.pipeline.schedules import PipelineForward, chunks_of_rank, make_schedule
from launcher.profiling.performance import StepClock

if TYPE_CHECKING:
    from launcher.engines.context import Context
    from launcher.verification.forked_ranks import CaseAnswer

_CPU = torch.device("cpu")


def run_sleeping_stages(context: Context, *, pipelined: PipelineCase, unit_s: float, warmup: int) -> CaseAnswer:
    """Send micro-batches through sleeping stages; return when, busy seconds and peak held.

    Args:
        context: of this rank, one stage of the pipeline.
        pipelined: what to send through what.
        unit_s: a rank's time for the forward pass of a micro-batch, all its chunks together.
        warmup: times everything is sent through first, besides a first time without sleep, in which the ranks connect.
    """
    torch.set_num_threads(1)
    connect(context, _CPU)
    meter = IdleMeter()
    passes, order = _training(pipelined, meter) if pipelined.work == "train" else _forward(pipelined, meter)
    for number in range(warmup + 2):
        meter.unit_s = unit_s / pipelined.num_chunks if number else 0.0
        barrier()
        meter.busy_s = meter.live = meter.most_live = 0
        started = time.perf_counter()
        passes()
        ended = time.perf_counter()
    barrier()
    disconnect()
    return {
        "began_s": started,
        "ended_s": ended,
        "busy_s": meter.busy_s,
        "live": meter.most_live,
        "order": order,
    }


class IdleMeter:
    """Work of one rank in one step: busy seconds and live micro-batches."""

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
    """A stage whose forward pass, input gradient and weight gradient take equally long."""

    def __init__(self, meter: IdleMeter, *, last: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.last = last
        self._meter = meter

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the input after the pass's time."""
        kept = _OfInput.apply(hidden, self._meter)
        return kept + _OfWeight.apply(self.weight, self._meter)


def _own(pipelined: PipelineCase, meter: IdleMeter) -> dict[int, SleepingStage]:
    count = pipelined.stages * pipelined.num_chunks
    numbers = chunks_of_rank(
        pipelined.schedule, rank=dist.get_rank(), ranks=pipelined.stages, chunks=pipelined.num_chunks
    )
    return {number: SleepingStage(meter, last=number == count - 1) for number in numbers}


def _training(pipelined: PipelineCase, meter: IdleMeter) -> tuple[Callable[[], None], dict[int, list[SchedulePass]]]:
    """Return a function that trains one step, and the order of passes on each rank."""
    own, meta = _own(pipelined, meter), torch.empty(1, 1, device="meta", requires_grad=True)
    schedule = make_schedule(
        pipelined.schedule,
        [(number, sleeper, (meta, meta)) for number, sleeper in own.items()],
        count=pipelined.stages * pipelined.num_chunks,
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
    """Return the forward passes alone, by the code of evaluation and generation."""
    own: Any = _own(pipelined, meter)  # to the relay they are chunks
    count = pipelined.stages * pipelined.num_chunks
    owners = [rank_of_chunk(pipelined.schedule, number, ranks=pipelined.stages) for number in range(count)]
    relay = PipelineForward(own, owners=owners, hidden_size=1, device=_CPU, group=dist.group.WORLD)
    tokens = [torch.ones(1, 1)] * pipelined.micro_batches

    def forward() -> None:
        with torch.no_grad():
            relay.forward(tokens, lambda chunk, state, _: chunk(state.view(1, 1, 1)))

    return forward, {}


def order_of(schedule: Any) -> dict[int, list[SchedulePass]]:
    """Return the passes of each rank, for schedules whose order torch lists correctly.

    It does so for schedules of several chunks.
    """
    if len(getattr(schedule, "_stages", ())) < 2:
        return {}
    return {
        rank: [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in actions if a is not None]
        for rank, actions in schedule.pipeline_order.items()
    }


_BACKWARD = ("backward_one_chunk", "backward_weight_one_chunk")


def run_model_stages(context: Context, *, trains: bool, warmup: int) -> CaseAnswer:
    """Run a step, or its forward passes alone; return when, and the busy seconds of this rank.

    Args:
        context: of this rank, one stage of the pipeline or the one process that does all.
        trains: whether to take the whole step.
        warmup: times it is done first.
    """
    cuda = torch.cuda.is_available()
    clock = StepClock(context.heartbeat, cuda=cuda)
    with make_engine(context, clock) as engine:
        chunks = engine.module if isinstance(engine.module, nn.ModuleList) else ()
        meter = BusyMeter(chunks, device=engine.device)
        batches = random_batches(context)
        for _ in range(warmup + 1):
            barrier()
            clock.pop_times()
            meter.busy_s, started = 0.0, _now(engine.device)
            if trains:
                engine.step(batches, lr=context.run.optimizer.lr)
            else:
                engine.loss_of(batches)
            ended = _now(engine.device)
        passes_s = clock.pop_times().get("pipeline", ended - started)  # without the update, which no schedule orders
        barrier()
    return {"began_s": started, "ended_s": ended, "pass_s": passes_s, "busy_s": meter.busy_s}


def fold_ranks(answers: Sequence[CaseAnswer], *, tokens: int) -> dict[str, float]:
    """Combine the ranks' answers for a case: seconds, tokens a second, idle share.

    The step lasts from the first rank's start to the last one's end: ranks leave a barrier a little apart, and all of a
    case share a host, whose monotonic clock is one for all processes.

    Args:
        answers: by rank.
        tokens: that went through; 0 where stages only slept.
    """
    elapsed_s = max(answer["ended_s"] for answer in answers) - min(answer["began_s"] for answer in answers)
    passes_s = max(answer.get("pass_s", elapsed_s) for answer in answers)
    found = {"step_s": elapsed_s}
    if len(answers) > 1:
        found["idle_share"] = 1 - sum(answer["busy_s"] for answer in answers) / (len(answers) * passes_s)
    if tokens:
        found["tokens_per_s"] = tokens / elapsed_s
    return found


class BusyMeter:
    """Counts the seconds in which pipeline chunks compute, without those in which they wait.

    It patches torch's stages permanently: use the process for nothing else.
    """

    def __init__(self, chunks: Iterable[nn.Module], *, device: torch.device) -> None:
        self.busy_s, self._device, self._started = 0.0, device, 0.0
        for chunk in chunks:
            chunk.register_forward_pre_hook(lambda *_: self._begin())
            chunk.register_forward_hook(lambda *_: self._end())
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
