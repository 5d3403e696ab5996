"""Progress, exit and stack of every rank, as last reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from launcher.protocol.heartbeat import PREEMPTED
from launcher.protocol.messages import RankExited, RankHeartbeat, RankRaised, RankStack
from launcher.protocol.outcome import RankProgress
from launcher.supervision.stack_dump import StackTrace, read_dump, read_traceback
from launcher.supervision.stall import RankPosition, Stall, is_stalled

NOT_STARTED = "not started"
DONE = "done"
"""Phase of a rank whose work is done, perhaps before the last step that was planned."""


class RankTracker:
    """Keeps the newest position, exit and stack of every rank; ``now`` is monotonic time.

    Args:
        host_of: the host of every rank.
        num_steps: optimizer steps of the whole run; a rank that exits with 0 before the last one, and has not reported
            that its work is done, has left early.
    """

    def __init__(self, host_of: Mapping[int, str], *, num_steps: int) -> None:
        self._host_of, self._num_steps = host_of, num_steps
        self._positions: dict[int, RankPosition] = {}
        self._steps: dict[int, int] = {}
        self._stack_at: dict[int, float] = {}
        self._raised: set[int] = set()
        self.stacks: dict[int, StackTrace] = {}
        """Stack of each rank: its answer to a stack dump, or the traceback of its exception."""
        self.exited: dict[int, RankExited] = {}
        self.has_saved_for_preemption = False
        """Whether rank 0 has saved the checkpoint that a signal asked for."""

    def launcher_started(self, host: str, *, now: float) -> None:
        """Expect the ranks of ``host`` to start."""
        for rank in (rank for rank, rank_host in self._host_of.items() if rank_host == host):
            self._positions[rank] = RankPosition(host=host, phase=NOT_STARTED, step=None, at=now)

    def rank_heartbeat(self, host: str, message: RankHeartbeat, *, now: float) -> None:
        """Record the position of a rank."""
        rank, step = message.rank, message.step
        if message.numbers.get(PREEMPTED):
            self.has_saved_for_preemption = True
        if rank not in self.exited:
            self._positions[rank] = RankPosition(host=host, phase=message.phase, step=step, at=now - message.age_s)
            self._steps[rank] = max(self._steps.get(rank, 0), step or 0)

    def rank_stack(self, message: RankStack, *, now: float) -> None:
        """Record the stack of a rank, unless it has raised: then it is on its way out."""
        if message.rank not in self._raised:
            self._add_stack(message.rank, read_dump(message.text, is_stopped=message.is_stopped), now)

    def rank_raised(self, message: RankRaised, *, now: float) -> None:
        """Record the traceback of a rank's exception."""
        self._raised.add(message.rank)
        self._add_stack(message.rank, read_traceback(message.traceback), now)

    def rank_exited(self, message: RankExited) -> None:
        """Record that a rank has exited."""
        self.exited[message.rank] = message

    @property
    def has_stepped(self) -> bool:
        """Whether a rank has reached its first step."""
        return any(self._steps.values())

    @property
    def all_have_stepped(self) -> bool:
        """Whether every rank has taken its first step."""
        return len(self._steps) == len(self._host_of) and all(self._steps.values())

    @property
    def all_succeeded(self) -> bool:
        """Whether every rank has exited with code 0."""
        return self.exited.keys() == self._host_of.keys() and all(exit.code == 0 for exit in self.exited.values())

    @property
    def living(self) -> dict[int, RankPosition]:
        """Positions of the ranks that have not exited."""
        return {rank: position for rank, position in self._positions.items() if rank not in self.exited}

    @property
    def lacks_stacks(self) -> bool:
        """Whether the stack of some living rank that has started is unknown."""
        started = {rank for rank, position in self.living.items() if position.phase != NOT_STARTED}
        return not started <= self.stacks.keys()

    def find_stall(self, *, now: float, timeout_s: float) -> Stall | None:
        """Return a stall once some rank has been silent for ``timeout_s``; 0 disables the check."""
        positions = self.living
        return Stall(now=now, positions=positions) if is_stalled(positions, now=now, timeout_s=timeout_s) else None

    def first_early_exit(self) -> RankExited | None:
        """Return the first rank that exited with code 0 before the last step."""
        early = [
            exit
            for exit in self.exited.values()
            if exit.code == 0
            and self._steps.get(exit.rank, 0) < self._num_steps
            and not (exit.rank in self._positions and self._positions[exit.rank].phase == DONE)
        ]
        return min(early, key=lambda exit: exit.time, default=None)

    def describe_early_exit(self, exit: RankExited) -> str:
        """Return a sentence about a rank that left early."""
        step = self._steps.get(exit.rank)
        when = f"at step {step} of {self._num_steps}" if step else "before its first step"
        return f"rank {exit.rank} on {self._host_of[exit.rank]} left early, {when}, with exit code 0"

    def progress(self, stall: Stall | None = None) -> tuple[RankProgress, ...]:
        """Return the progress of all ranks at ``stall``, or of those with known stacks without one."""
        if stall is None:
            return tuple(self._progress(rank, self._positions[rank], at) for rank, at in sorted(self._stack_at.items()))
        exited = [
            replace(self._progress(rank, position, position.at), phase="ended")
            for rank, position in self._positions.items()
            if rank in self.exited
        ]
        living = [self._progress(rank, position, stall.now) for rank, position in stall.positions.items()]
        return tuple(sorted([*exited, *living], key=lambda progress: progress.rank))

    def _add_stack(self, rank: int, stack: StackTrace, now: float) -> None:
        self.stacks[rank] = stack
        if rank in self._positions:
            self._stack_at[rank] = now

    def _progress(self, rank: int, position: RankPosition, now: float) -> RankProgress:
        stack = self.stacks.get(rank, StackTrace(text=""))
        return RankProgress(
            rank=rank,
            host=position.host,
            phase=position.phase,
            step=position.step,
            silent_s=round(now - position.at, 1),
            where=stack.where,
            collective=stack.collective,
            stack=stack.text,
        )
