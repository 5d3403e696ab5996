"""Several ranks that hold one model between them: the first schedules and samples, all compute the same plans."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import distributed as dist

from launcher.profiling.base import NO_PROFILER, Profiler
from launcher.serving.plan import StepPlan

if TYPE_CHECKING:
    from torch import Tensor

_EAGER_S = 0.01
"""How long a rank asks without pause whether the next plan is there."""
_POLL_S = 0.001
_BEAT_S = 0.5


class Follows(Protocol):
    """What computes the same plans on every rank."""

    def run(self, plan: StepPlan) -> Tensor:
        """Compute one; what the first rank gets are the scores."""

    def close(self) -> None:
        """Give everything back."""


class Leading:
    """Sends each plan to the other ranks before computing it.

    Args:
        runner: of this rank, the first of its group.
        group: of the ranks that hold the model; plans go over it as integers.
    """

    isolates = False
    """A step that fails here may not fail on the others: nothing is tried again, the run ends."""

    def __init__(self, runner: Follows, group: dist.ProcessGroup) -> None:
        self._runner, self._group = runner, group

    def run(self, plan: StepPlan) -> Tensor:
        """Return the scores that are asked for; (wanted, vocabulary), fp32."""
        self._send(plan)
        return self._runner.run(plan)

    def close(self) -> None:
        """Let the others go, and the model."""
        self._send(StepPlan((), stop=True))
        self._runner.close()

    def _send(self, plan: StepPlan) -> None:
        numbers = torch.tensor(plan.encode())
        source = dist.get_global_rank(self._group, 0)
        dist.broadcast(torch.tensor([len(numbers)]), source, group=self._group)
        dist.broadcast(numbers, source, group=self._group)


def follow_plans(
    runner: Follows, group: dist.ProcessGroup, *, beat: Callable[[], None], profiler: Profiler = NO_PROFILER
) -> None:
    """Compute what the first rank sends, until it closes.

    Args:
        runner: of this rank.
        group: that plans come over.
        beat: called while there is none, at least every half second: to wait for requests is no stall.
        profiler: each plan is a step of it.
    """
    source = dist.get_global_rank(group, 0)
    while True:
        length = torch.zeros(1, dtype=torch.long)
        _wait(dist.broadcast(length, source, group=group, async_op=True), beat=beat)
        numbers = torch.zeros(int(length), dtype=torch.long)
        dist.broadcast(numbers, source, group=group)
        plan = StepPlan.decode(numbers.tolist())
        if plan.stop:
            runner.close()
            return
        with profiler.step():
            runner.run(plan)
        beat()


def _wait(work: dist.Work, *, beat: Callable[[], None]) -> None:
    begun_s = beaten_s = time.monotonic()
    while not work.is_completed():
        now_s = time.monotonic()
        if now_s - beaten_s > _BEAT_S:
            beat()
            beaten_s = now_s
        if now_s - begun_s > _EAGER_S:
            time.sleep(_POLL_S)
    work.wait()
