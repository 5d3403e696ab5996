"""Progress, exit and stack of every rank, as last reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from launcher.protocol.messages import AgentMessage, LauncherStarted, RankExited, RankHeartbeat, RankRaised, RankStack
from launcher.protocol.outcome import RankProgress
from launcher.supervision.stack_dump import StackTrace, read_dump, read_traceback
from launcher.supervision.stall import RankPosition, Stall, is_stalled

NOT_STARTED = "not started"


class RankTracker:
    """Collects what is told of places.

    Args:
        host_of: the host of every rank.
        steps: optimiser steps of the whole run: a rank that ends well before has left early.
    """

    def __init__(self, host_of: Mapping[int, str], *, steps: int) -> None:
        self._host_of, self._steps = host_of, steps
        self._last: dict[int, RankPosition] = {}
        self._seen_at: dict[int, float] = {}
        self.stacks: dict[int, StackTrace] = {}
        """What is known of each rank: its answer, or the traceback of its exception."""
        self.ended: dict[int, RankExited] = {}
        self._reached: dict[int, int] = {}
        self._raised: set[int] = set()

    def hear(self, host: str, message: AgentMessage, *, now: float) -> None:
        """Take one event; ``now`` is ``time.monotonic()``."""
        match message:
            case LauncherStarted():
                for rank in (rank for rank, at in self._host_of.items() if at == host):
                    self._last[rank] = RankPosition(host=host, phase=NOT_STARTED, step=None, at=now)
            case RankHeartbeat(rank=rank, phase=phase, step=step) if rank not in self.ended:
                self._last[rank] = RankPosition(host=host, phase=phase, step=step, at=now - message.age_s)
                self._reached[rank] = max(self._reached.get(rank, 0), step or 0)
            case RankStack(rank=rank) if rank not in self._raised:  # else it was seen on its way out
                self._see(rank, read_dump(message.text, is_stopped=message.is_stopped), now)
            case RankRaised(rank=rank):
                self._raised.add(rank)
                self._see(rank, read_traceback(message.traceback), now)
            case RankExited(rank=rank):
                self.ended[rank] = message
            case _:
                pass

    @property
    def has_begun(self) -> bool:
        """Whether a rank has reached its first step."""
        return any(self._reached.values())

    @property
    def living(self) -> dict[int, RankPosition]:
        """Ranks that may go on."""
        return {rank: place for rank, place in self._last.items() if rank not in self.ended}

    @property
    def lacks_stacks(self) -> bool:
        """Whether some living rank that has begun has not shown its stack."""
        begun = {rank for rank, place in self.living.items() if place.phase != NOT_STARTED}
        return not begun <= self.stacks.keys()

    def standstill(self, *, now: float, timeout_s: float) -> Stall | None:
        """Return the present moment once some rank has been silent for ``timeout_s`` seconds; 0 waits for ever."""
        positions = self.living
        return Stall(now=now, positions=positions) if is_stalled(positions, now=now, timeout_s=timeout_s) else None

    def left_early(self) -> RankExited | None:
        """Return the first rank that ended well, though there were steps left to take."""
        early = [end for end in self.ended.values() if end.code == 0 and self._reached.get(end.rank, 0) < self._steps]
        return min(early, key=lambda end: end.time, default=None)

    def how_left(self, end: RankExited) -> str:
        """Return in words how a rank left early."""
        reached = self._reached.get(end.rank)
        when = f"at step {reached} of {self._steps}" if reached else "before its first step"
        return f"rank {end.rank} on {self._host_of[end.rank]} left early, {when}, with exit code 0"

    def progress(self, standstill: Stall | None = None) -> tuple[RankProgress, ...]:
        """Return where each rank was: at ``standstill`` all of them, else those whose stacks are known."""
        if standstill is None:
            return tuple(self._progress(rank, self._last[rank], at) for rank, at in sorted(self._seen_at.items()))
        places = standstill.positions
        left = {rank: place for rank, place in self._last.items() if rank in self.ended}
        gone = [replace(self._progress(rank, place, place.at), phase="ended") for rank, place in left.items()]
        here = [self._progress(rank, place, standstill.now) for rank, place in places.items()]
        return tuple(sorted([*gone, *here], key=lambda progress: progress.rank))

    def _see(self, rank: int, stack: StackTrace, now: float) -> None:
        self.stacks[rank] = stack
        if rank in self._last:
            self._seen_at[rank] = now

    def _progress(self, rank: int, place: RankPosition, now: float) -> RankProgress:
        stack = self.stacks.get(rank, StackTrace(text=""))
        return RankProgress(
            rank=rank,
            host=place.host,
            phase=place.phase,
            step=place.step,
            silent_s=round(now - place.at, 1),
            where=stack.where,
            collective=stack.collective,
            stack=stack.text,
        )
