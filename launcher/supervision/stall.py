"""Stall detection: whether a run makes no progress, and which rank the others wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launcher.supervision.stack_dump import StackTrace


@dataclass(frozen=True, kw_only=True)
class RankPosition:
    """Last known position of a rank."""

    host: str
    phase: str
    step: int | None
    at: float
    """``time.monotonic()`` of the session."""

    @property
    def order(self) -> tuple[int, float]:
        """Sort key, smaller is further behind: by step, then by time of the last heartbeat.

        A rank enters a collective after the rank it waits for has stopped.
        """
        return (-1 if self.step is None else self.step, self.at)

    @property
    def description(self) -> str:
        """Phase and step, as text."""
        return self.phase if self.step is None else f"{self.phase} of step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Stall:
    """Positions of the living ranks when a stall was detected."""

    now: float
    """``time.monotonic()`` of the session."""
    positions: Mapping[int, RankPosition]
    """Every living rank."""

    def silence_s(self, rank: int) -> float:
        """Return the time since the rank's last heartbeat."""
        return self.now - self.positions[rank].at


def is_stalled(positions: Mapping[int, RankPosition], *, now: float, timeout_s: float) -> bool:
    """Return whether some rank has been silent for ``timeout_s`` seconds; 0 disables the check."""
    return timeout_s > 0 and any(now - position.at > timeout_s for position in positions.values())


def find_straggler(positions: Mapping[int, RankPosition], stacks: Mapping[int, StackTrace]) -> int:
    """Return the rank that the others wait for.

    It is the rank that is not in a collective when others are, or not where most ranks are; among several such
    ranks, or without any, the one furthest behind.
    """
    waiting = ranks_in_collectives(positions, stacks)
    elsewhere = positions.keys() - waiting
    if not waiting or not elsewhere:
        places = {rank: (stack.collective, stack.where) for rank, stack in stacks.items() if rank in positions}
        elsewhere = positions.keys() - _majority(places)
    candidates = elsewhere or positions.keys()
    return min(candidates, key=lambda rank: positions[rank].order)


def ranks_in_collectives(positions: Mapping[int, RankPosition], stacks: Mapping[int, StackTrace]) -> set[int]:
    """Return the ranks that wait for others in a collective."""
    return {rank for rank in positions if rank in stacks and stacks[rank].collective and not stacks[rank].is_stopped}


def describe_straggler(rank: int, stall: Stall, stacks: Mapping[int, StackTrace]) -> str:
    """Return a sentence that names ``rank`` as the one that the others wait for."""
    position, stack = stall.positions[rank], stacks.get(rank)
    said = f"rank {rank} on {position.host} has not moved for {stall.silence_s(rank):.0f} s"
    said += f" (last seen in {position.description})"
    if stack is not None and (stack.where or stack.is_stopped):
        said += ": it was stopped by a signal" if stack.is_stopped else ": it is"
        said += f" at {stack.where}" if stack.where and not stack.collective else ""
        said += f" in {stack.place}" if stack.collective else ""
    others = {other: place for other, place in stall.positions.items() if other != rank}
    waits = describe_wait(others, stacks)
    return f"{said} while {waits}" if waits else said


def describe_wait(positions: Mapping[int, RankPosition], stacks: Mapping[int, StackTrace]) -> str:
    """Return where most waiting ranks wait: ``ranks 0, 2 wait in all_reduce (…)``."""
    waiting = {rank: stacks[rank].place for rank in ranks_in_collectives(positions, stacks)}
    if not waiting:
        return ""
    place, _ = Counter(dict(sorted(waiting.items())).values()).most_common(1)[0]
    ranks = [rank for rank, at in waiting.items() if at == place]
    return f"{format_ranks(ranks)} {'wait' if len(ranks) > 1 else 'waits'} in {place}"


def format_ranks(ranks: Collection[int]) -> str:
    """Return ``rank 3``, or ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = (f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(words)}"


def _majority(places: Mapping[int, tuple[str, str]]) -> set[int]:
    """Return the ranks at the place of more than half of them; empty without such a place."""
    if not places:
        return set()
    place, number = Counter(places.values()).most_common(1)[0]
    return {rank for rank, at in places.items() if at == place} if 2 * number > len(places) else set()
