"""Stages that sleep for a known time instead of computing, in the schedules that the engine uses."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from launcher.engines.distributed import barrier, connect, disconnect
from launcher.engines.pipelining.relay import Relay
from launcher.engines.pipelining.schedules import make_schedule, own_stretches
from launcher.parallel.pipeline import owner_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.benchmarks.bubble import Pass
    from launcher.benchmarks.pipelined import Pipelined
    from launcher.context import Context
    from launcher.verification.fork import Answer

_CPU = torch.device("cpu")


def sleep(context: Context, *, pipelined: Pipelined, unit_s: float, warmup: int) -> Answer:
    """Send micro-batches through stages that sleep; return seconds from start to end, busy ones, and what was held.

    Args:
        context: of this rank, one stage of the pipeline.
        pipelined: what to send through what.
        unit_s: a rank's time for the forward pass of a micro-batch, all its stretches together.
        warmup: times everything is sent through first, beside one in which nobody sleeps and the ranks connect.
    """
    torch.set_num_threads(1)
    connect(context, _CPU)
    meter = Meter()
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


class Meter:
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
    def forward(ctx: Any, hidden: Tensor, meter: Meter) -> Tensor:
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
    def forward(ctx: Any, weight: Tensor, meter: Meter) -> Tensor:
        ctx.meter = meter
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        ctx.meter.work()
        return gradients[0].clone(), None


class Sleeper(nn.Module):  # type: ignore[misc]
    """A stage that takes the same time for a forward pass, for the gradient of its input and for that of its weight."""

    def __init__(self, meter: Meter, *, last: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.last = last
        self._meter = meter

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what came in, later."""
        kept = _OfInput.apply(hidden, self._meter)
        return kept + _OfWeight.apply(self.weight, self._meter)


def _own(pipelined: Pipelined, meter: Meter) -> dict[int, Sleeper]:
    count = pipelined.stages * pipelined.chunks
    numbers = own_stretches(pipelined.schedule, rank=dist.get_rank(), ranks=pipelined.stages, chunks=pipelined.chunks)
    return {number: Sleeper(meter, last=number == count - 1) for number in numbers}


def _training(pipelined: Pipelined, meter: Meter) -> tuple[Callable[[], None], dict[int, list[Pass]]]:
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


def _forward(pipelined: Pipelined, meter: Meter) -> tuple[Callable[[], None], dict[int, list[Pass]]]:
    """Return what takes the forward passes alone, by what evaluation and generation go through."""
    own: Any = _own(pipelined, meter)  # to the relay they are stretches
    count = pipelined.stages * pipelined.chunks
    owners = [owner_of(pipelined.schedule, number, ranks=pipelined.stages) for number in range(count)]
    relay = Relay(own, owners=owners, width=1, device=_CPU, group=dist.group.WORLD)
    tokens = [torch.ones(1, 1)] * pipelined.micro_batches

    def forward() -> None:
        with torch.no_grad():
            relay.through(tokens, lambda stretch, state, _: stretch(state.view(1, 1, 1)))

    return forward, {}


def order_of(schedule: Any) -> dict[int, list[Pass]]:
    """Return the passes of each rank, where torch lists them rightly: it does for schedules of several stretches."""
    if len(getattr(schedule, "_stages", ())) < 2:
        return {}
    return {
        rank: [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in actions if a is not None]
        for rank, actions in schedule.pipeline_order.items()
    }
