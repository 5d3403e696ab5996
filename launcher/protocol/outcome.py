"""Outcome of a run, and the failure that `failure.json` records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from launcher.errors import EXIT_PREEMPTED
from launcher.protocol.results import RunStatus


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How a run ended, as a backend's ``submit`` returns it."""

    status: RunStatus | Literal["submitted"]
    """``submitted``: a scheduler runs it and will write the result."""
    exit_code: int
    """0, the first failing rank's own, 128+n for a signal, 75 if preempted, 124 if stalled."""
    failure: Failure | None = None
    port_taken: bool = False
    """The port of the rendezvous was in use and no step was taken: retry with another port."""
    lost_hosts: tuple[str, ...] = ()
    """Hosts whose agents were lost."""


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A rank that ended because another one failed."""

    rank: int
    host: str
    exit_code: int | None
    signal: int | None


@dataclass(frozen=True, kw_only=True)
class RankProgress:
    """Last known position of one rank."""

    rank: int
    host: str
    phase: str
    step: int | None
    silent_s: float
    """Time since its last heartbeat."""
    where: str = ""
    """Current line, ``launcher/training/trainer.py:88 in train_step``; empty if unknown."""
    collective: str = ""
    """Collective in which it waited for other ranks, if it did."""
    stack: str = ""
    """Stacks of all its threads; ``logs/stacks.txt`` holds them, not ``failure.json``."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The cause of a failed run; ``failure.json`` holds exactly this, without the stacks."""

    host: str
    rank: int | None
    """``None`` when it was not a rank: a preparing command, torchrun, an agent."""
    exit_code: int
    """Exit code of the run: the first failing rank's own, 128+n for a signal."""
    signal: int | None
    reason: str
    """One sentence: which process failed and how."""
    error: str = ""
    """Type and message of the exception, where there was one."""
    traceback: str = ""
    """The traceback, or else the end of the log."""
    log: str = ""
    """Path of the full log."""
    time: float = 0.0
    """Seconds since the epoch."""
    victims: tuple[Victim, ...] = ()
    ranks: tuple[RankProgress, ...] = ()
    """Position of every rank at a stall, or of the others when one died without an exception."""

    def tree(self) -> dict[str, Any]:
        """Return the content of ``failure.json``."""
        tree = asdict(self)
        for progress in tree["ranks"]:
            del progress["stack"]
        return tree

    @property
    def is_preemption(self) -> bool:
        """Whether a rank saved a checkpoint and exited because it was asked to."""
        return self.exit_code == EXIT_PREEMPTED
