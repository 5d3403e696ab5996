"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.results import Status
from launcher.supervise.failure import Failure


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a backend returns from ``submit``."""

    status: Status | Literal["submitted"]
    """``submitted``: a scheduler has it and will write down how it ends."""
    exit_code: int
    """0; the first failing rank's own; 128+n for a signal; 75 for a preempted run; 124 for one that stood still."""
    failure: Failure | None = None
    port_taken: bool = False
    """The port of the rendezvous belonged to somebody else, and nothing had been done: try again with another."""
    lost_hosts: tuple[str, ...] = ()
    """Hosts that were not there any more at the end."""
