"""Several ranks as one engine: step plans are broadcast, and pipelined over stages."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import distributed as dist

from launcher.inference.engine.step_plan import StepPlan, split_plan
from launcher.profiling.profiler import NO_PROFILER, Profiler

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.inference.engine.model_runner import ModelRunner


_SPIN_S = 0.01
"""How long a rank asks without pause whether the next plan is there."""
_POLL_S = 0.001
_HEARTBEAT_S = 0.5


class PlanRunner(Protocol):
    """Runs the same plans on every rank."""

    def run(self, plan: StepPlan) -> Tensor:
        """Compute one; the first rank gets the logits."""

    def close(self) -> None:
        """Free everything."""


class LeaderRunner:
    """Sends each plan to the other ranks before computing it.

    Args:
        runner: of this rank, the first of its group.
        group: of the ranks that hold the model; plans go over it as integers.
    """

    isolates = False
    """A step that fails here may not fail on the others: nothing is tried again, the run ends."""

    def __init__(self, runner: PlanRunner, group: dist.ProcessGroup) -> None:
        self._runner, self._group = runner, group

    def run(self, plan: StepPlan) -> Tensor:
        """Return the logits of sampled sequences; (sampled sequences, vocabulary), fp32."""
        self._send(plan)
        return self._runner.run(plan)

    def close(self) -> None:
        """End the other ranks' loops, and free the model."""
        self._send(StepPlan((), stop=True))
        self._runner.close()

    def _send(self, plan: StepPlan) -> None:
        numbers = torch.tensor(plan.encode())
        source = dist.get_global_rank(self._group, 0)
        dist.broadcast(torch.tensor([len(numbers)]), source, group=self._group)
        dist.broadcast(numbers, source, group=self._group)


def follow_leader(
    runner: PlanRunner, group: dist.ProcessGroup, *, heartbeat: Callable[[], None], profiler: Profiler = NO_PROFILER
) -> None:
    """Compute what the first rank sends, until it closes.

    Args:
        runner: of this rank.
        group: that plans come over.
        heartbeat: called while there is none, at least every half second: waiting for requests is no stall.
        profiler: each plan is a step of it.
    """
    source = dist.get_global_rank(group, 0)
    while True:
        length = torch.zeros(1, dtype=torch.long)
        _wait(dist.broadcast(length, source, group=group, async_op=True), heartbeat=heartbeat)
        numbers = torch.zeros(int(length), dtype=torch.long)
        dist.broadcast(numbers, source, group=group)
        plan = StepPlan.decode(numbers.tolist())
        if plan.stop:
            runner.close()
            return
        with profiler.step():
            runner.run(plan)
        heartbeat()


def _wait(work: dist.Work, *, heartbeat: Callable[[], None]) -> None:
    started_s = heartbeat_s = time.monotonic()
    while not work.is_completed():
        now_s = time.monotonic()
        if now_s - heartbeat_s > _HEARTBEAT_S:
            heartbeat()
            heartbeat_s = now_s
        if now_s - started_s > _SPIN_S:
            time.sleep(_POLL_S)
    work.wait()


class PipelinedRunner:
    """Computes plans on all stages; every rank calls ``run`` with the same ones.

    Args:
        runner: of this rank's stage.
        group: of all stages, for tensors on CPUs; ranks are numbers of stages.
    """

    isolates = False
    """A step that fails here may not fail on the others."""

    def __init__(self, runner: ModelRunner, group: dist.ProcessGroup) -> None:
        self._runner, self._group, self._stage = runner, group, runner.stage
        config = runner.model.config.get_text_config()
        self._hidden_size, self._vocab_size = config.hidden_size, config.vocab_size

    def run(self, plan: StepPlan) -> Tensor:
        """Return the logits of sampled sequences on the first rank, an empty tensor on others.

        Their shape is (sampled sequences, vocabulary), in fp32.
        """
        stage, model = self._stage, self._runner.model
        parts = split_plan(plan, stage.count)
        # tensors stay alive here until they are received; no rank waits for a neighbour that waits for it
        in_flight: list[tuple[dist.Work, Tensor]] = []
        for part in parts:
            hidden = None
            if not stage.first:
                tokens = sum(len(segment.tokens) for segment in part.segments) + part.padding
                hidden = torch.empty((1, tokens, self._hidden_size), dtype=model.dtype, device=model.device)
                dist.recv(hidden, stage.number - 1)
            made = self._runner.run(part, hidden).contiguous()
            if not stage.last:
                in_flight.append((dist.isend(made, stage.number + 1), made))
            elif len(made):
                made = made.cpu()
                in_flight.append((dist.isend(made, 0, group=self._group), made))
        logits = [self._logits(part) for part in parts] if stage.first else []
        for work, _ in in_flight:
            work.wait()
        return torch.cat(logits).to(model.device) if logits else torch.empty(0)

    def _logits(self, part: StepPlan) -> Tensor:
        """Return the last stage's output for a part."""
        received = torch.empty((sum(segment.needs_logits for segment in part.segments), self._vocab_size))
        if len(received):
            dist.recv(received, self._stage.count - 1, group=self._group)
        return received

    def close(self) -> None:
        """Free the model."""
        self._runner.close()
