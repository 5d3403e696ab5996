"""Noticing that a run stands still, and which rank holds it up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.supervise.failure import Progress


@dataclass(frozen=True, kw_only=True)
class Position:
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


def silent(positions: Mapping[int, Position], *, now: float, timeout_s: float) -> bool:
    """Return whether some rank has not moved for ``timeout_s`` seconds; 0 waits for ever."""
    return timeout_s > 0 and any(now - position.at > timeout_s for position in positions.values())


def furthest_behind(positions: Mapping[int, Position]) -> int:
    """Return the rank that the others wait for."""
    return min(positions, key=lambda rank: positions[rank].order)


def progress(positions: Mapping[int, Position], *, now: float) -> tuple[Progress, ...]:
    """Return how far each rank had come, for the report."""
    return tuple(
        Progress(rank=rank, host=place.host, phase=place.phase, step=place.step, silent_s=round(now - place.at, 1))
        for rank, place in sorted(positions.items())
    )
