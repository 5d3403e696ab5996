"""The run's model in stages: how long a step or its forward passes take, and how much of that ranks are at work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from launcher.benchmarks.batches import random_batches
from launcher.engines import make_engine
from launcher.engines.distributed import barrier
from launcher.training.clock import Clock

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.verification.fork import Answer

_BACKWARD = ("backward_one_chunk", "backward_weight_one_chunk")


def compute(context: Context, *, learns: bool, warmup: int) -> Answer:
    """Take a step of the run, or its forward passes alone; return its seconds and those in which this rank computed.

    Args:
        context: of this rank, one stage of the pipeline or the one process that does all.
        learns: whether to take the whole step.
        warmup: times it is done first.
    """
    cuda = torch.cuda.is_available()
    clock = Clock(context.heartbeat, cuda=cuda)
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


def fold(answers: Sequence[Answer], *, tokens: int) -> dict[str, float]:
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
