"""Outcome of a run, and the failure that `failure.json` records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from launcher.errors import EXIT_PREEMPTED
from launcher.protocol.results import RunStatus


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What a backend returns from ``submit``."""

    status: RunStatus | Literal["submitted"]
    """``submitted``: a scheduler has it and will write down how it ends."""
    exit_code: int
    """0; the first failing rank's own; 128+n for a signal; 75 for a preempted run; 124 for one that stood still."""
    failure: Failure | None = None
    port_taken: bool = False
    """The rendezvous port was in use and no rank had started: retry with another port."""
    lost_hosts: tuple[str, ...] = ()
    """Hosts that were not there any more at the end."""


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A rank that ended because another one had failed; never the cause."""

    rank: int
    host: str
    exit_code: int | None
    signal: int | None


@dataclass(frozen=True, kw_only=True)
class RankProgress:
    """How far one rank had come."""

    rank: int
    host: str
    phase: str
    step: int | None
    silent_s: float
    """Time since it last said so."""
    where: str = ""
    """The line it was at, ``launcher/training/trainer.py:88 in train_step``; empty when its stack is not known."""
    collective: str = ""
    """What it waited for other ranks in there, if it did."""
    stack: str = ""
    """Stacks of all its threads; ``logs/stacks.txt`` holds them, not ``failure.json``."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The cause of a failed run; ``failure.json`` holds exactly this, without the stacks."""

    host: str
    rank: int | None
    """``None`` when it was not a rank: a preparation, torchrun, an agent."""
    exit_code: int
    """Of the run: the first failing rank's own, 128+n for a signal."""
    signal: int | None
    reason: str
    """One sentence: who ended how."""
    error: str = ""
    """Type and message of the exception, where there was one."""
    traceback: str = ""
    """The traceback, or the end of the log of what died without one."""
    log: str = ""
    """Path of the log that holds more."""
    time: float = 0.0
    """Seconds since the epoch."""
    victims: tuple[Victim, ...] = ()
    ranks: tuple[RankProgress, ...] = ()
    """Where every rank was when the run stood still; or, when a rank died without a word, where the others were."""

    def tree(self) -> dict[str, Any]:
        """Return the content of ``failure.json``."""
        tree = asdict(self)
        for place in tree["ranks"]:
            del place["stack"]
        return tree

    @property
    def is_preemption(self) -> bool:
        """Whether a rank ended because it was asked to, after saving what it needs to continue."""
        return self.exit_code == EXIT_PREEMPTED
