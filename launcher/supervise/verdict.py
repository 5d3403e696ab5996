"""Who failed first? Ranks that only noticed another one's death are not the cause.

When one rank dies, the others see their connections break, or are ended by torchrun, within milliseconds, and may well
be gone before the first one is. So the exits of a short while are collected, and told apart by what the ranks said.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.supervise.failure import Failure

SETTLE_S = 0.3
"""Time after the first failure in which others are collected."""

PATIENCE_S = 3.0
"""The same while every failure seen looks like the consequence of one not seen yet, or is no failure at all."""

_CONSEQUENCE = re.compile(
    r"DistBackendError|DistNetworkError|DistStoreError|Watchdog caught collective operation timeout"
    r"|Connection (closed|reset|refused)|Broken pipe|Socket closed|closed by peer|Application timeout"
)
_WAS_SIGNALLED = re.compile(r"SignalException.* got signal: (\d+)")
"""What torchrun says, before it exits with code 1, when somebody signalled it."""

_PORT_TAKEN = re.compile(r"EADDRINUSE|[Aa]ddress already in use")


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A failure that may be the cause."""

    failure: Failure
    is_consequence: bool


def looks_like_consequence(failure: Failure) -> bool:
    """Return whether a failed rank may only have noticed that another one was gone."""
    if says_port_taken(failure):
        return False
    said = failure.error or (failure.traceback if failure.signal == signal.SIGABRT else "")
    return _CONSEQUENCE.search(said) is not None


def says_port_taken(failure: Failure) -> bool:
    """Return whether it failed because its port belonged to somebody else."""
    return _PORT_TAKEN.search(f"{failure.error}\n{failure.traceback}") is not None


def signal_told_of(output: str) -> int | None:
    """Return the signal that torchrun says it got from outside."""
    found = _WAS_SIGNALLED.search(output)
    return int(found[1]) if found else None


def first_cause(suspects: Sequence[Suspect]) -> Failure:
    """Return the earliest failure that is no consequence, else the earliest."""
    return min(suspects, key=lambda suspect: (suspect.is_consequence, suspect.failure.time)).failure


def patience_for(heartbeat_timeout_s: float) -> float:
    """Return ``PATIENCE_S``, or what it takes to notice that a host has fallen silent, which tells no rank why."""
    return max(PATIENCE_S, heartbeat_timeout_s + SETTLE_S)


def is_settled(suspects: Sequence[Suspect], *, waited_s: float, patience_s: float = PATIENCE_S) -> bool:
    """Return whether it is time to decide, ``waited_s`` after the first failure was heard of.

    Ranks that leave after saving do so together, and each may take a while to let go of what it holds.
    """
    is_clear = any(not suspect.is_consequence and not suspect.failure.is_preemption for suspect in suspects)
    return waited_s >= (SETTLE_S if is_clear else patience_s)
