"""Stall detection: since when a run has not moved, and which rank holds it up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launcher.supervision.stack_dump import StackTrace


@dataclass(frozen=True, kw_only=True)
class RankPosition:
    """Where a rank was last heard of."""

    host: str
    phase: str
    step: int | None
    at: float
    """``time.monotonic()`` of the session."""

    @property
    def order(self) -> tuple[int, float]:
        """Smaller is further behind: by step, then by how long ago it moved.

        A rank that waits in a collective got there after the one it waits for stopped moving.
        """
        return (-1 if self.step is None else self.step, self.at)

    @property
    def words(self) -> str:
        """What it was doing, as far as it said so itself."""
        return self.phase if self.step is None else f"{self.phase} of step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Stall:
    """The moment at which a run was found to stand still."""

    now: float
    """``time.monotonic()`` of the session."""
    positions: Mapping[int, RankPosition]
    """Every living rank."""

    def silence_s(self, rank: int) -> float:
        """Return how long ago the rank moved."""
        return self.now - self.positions[rank].at


def is_stalled(positions: Mapping[int, RankPosition], *, now: float, timeout_s: float) -> bool:
    """Return whether some rank has not moved for ``timeout_s`` seconds; 0 waits for ever."""
    return timeout_s > 0 and any(now - position.at > timeout_s for position in positions.values())


def find_straggler(positions: Mapping[int, RankPosition], stacks: Mapping[int, StackTrace]) -> int:
    """Return the rank that the others wait for.

    It is the one that is not in a collective when others are, or in another place than most; among several such
    ranks, or without any, the one furthest behind.
    """
    waiting = ranks_in_collectives(positions, stacks)
    elsewhere = positions.keys() - waiting
    if not waiting or not elsewhere:
        places = {rank: (stack.collective, stack.where) for rank, stack in stacks.items() if rank in positions}
        elsewhere = positions.keys() - _majority(places)
    suspects = elsewhere or positions.keys()
    return min(suspects, key=lambda rank: positions[rank].order)


def ranks_in_collectives(positions: Mapping[int, RankPosition], stacks: Mapping[int, StackTrace]) -> set[int]:
    """Return the ranks that wait for others in a collective."""
    return {rank for rank in positions if rank in stacks and stacks[rank].collective and not stacks[rank].is_stopped}


def describe_straggler(rank: int, standstill: Stall, stacks: Mapping[int, StackTrace]) -> str:
    """Return the sentence that names ``rank`` as the one that the others wait for."""
    position, stack = standstill.positions[rank], stacks.get(rank)
    said = f"rank {rank} on {position.host} has not moved for {standstill.silence_s(rank):.0f} s"
    said += f" (last seen in {position.words})"
    if stack is not None and (stack.where or stack.is_stopped):
        said += ": it was stopped by a signal" if stack.is_stopped else ": it is"
        said += f" at {stack.where}" if stack.where and not stack.collective else ""
        said += f" in {stack.place}" if stack.collective else ""
    others = {other: place for other, place in standstill.positions.items() if other != rank}
    waits = describe_wait(others, stacks)
    return f"{said} while {waits}" if waits else said


def describe_wait(positions: Mapping[int, RankPosition], stacks: Mapping[int, StackTrace]) -> str:
    """Return which ranks wait in which collective, for most of them: ``ranks 0, 2 wait in all_reduce (…)``."""
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
    """Return the ranks at the place where more than half of them are; nobody when there is no such place."""
    if not places:
        return set()
    place, number = Counter(places.values()).most_common(1)[0]
    return {rank for rank, at in places.items() if at == place} if 2 * number > len(places) else set()
