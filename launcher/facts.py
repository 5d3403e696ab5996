"""What the planner must know of the machine that plans, found before it and given to it as a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Answers of the file system and the environment."""

    ops_folder: str
    """Where DeepSpeed's native ops of this environment are built."""
    missing_ops: tuple[str, ...] = ()
    """Native ops the run wants and that are not built yet."""


def gather() -> Facts:
    """Return the facts of this machine."""
    return Facts(ops_folder="")
