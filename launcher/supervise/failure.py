"""What is known about how a run failed."""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import EXIT_PREEMPTED


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A rank that ended because another one had failed; never the cause."""

    rank: int
    host: str
    exit_code: int | None
    signal: int | None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far one rank had come."""

    rank: int
    host: str
    phase: str
    step: int | None
    silent_s: float
    """Time since it last said so."""
    where: str = ""
    """The line it was at, ``launcher/training/loop.py:88 in train_step``; empty when its stack is not known."""
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
    ranks: tuple[Progress, ...] = ()
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


def exit_code_of(code: int | None, number: int | None) -> int:
    """Return what a shell would say: the code itself, or 128 plus the signal."""
    return 128 + number if number else code or 0


def ended_how(code: int | None, number: int | None) -> str:
    """Return the end of a process in words."""
    if not number:
        return f"ended with exit code {code}"
    return f"was ended by signal {number} ({name_of_signal(number)})"


def name_of_signal(number: int) -> str:
    """Return ``SIGKILL`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"real-time signal {number}"
