"""What the doctor says: one thing about one host, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    ERROR = "error"
    """A run would break: nothing is started."""
    WARNING = "warning"
    """A run would work, worse than it could."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    host: str
    level: Level
    what: str
    remedy: str


def error(host: str, what: str, remedy: str) -> Finding:
    """Return a finding that stands against a run."""
    return Finding(host=host, level=Level.ERROR, what=what, remedy=remedy)


def warning(host: str, what: str, remedy: str) -> Finding:
    """Return a finding that a run can live with."""
    return Finding(host=host, level=Level.WARNING, what=what, remedy=remedy)
