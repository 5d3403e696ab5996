"""The cells of the fault matrix: what is done to whom, in which run, and what has to come of it."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass

LAUNCHERS = ("ours", "torchrun", "deepspeed")
SIGNALS = ("INT", "TERM", "HUP", "QUIT", "KILL")
TARGETS = ("parent", "agent", "torchrun", "rank")
"""``torchrun`` is what starts the ranks of a host: for deepspeed its own launcher of one host."""
DISASTERS = ("power off", "link down", "link cut", "sshd killed")
"""What happens to a host. ``cut`` is silent: the link stays up and swallows everything."""
VARIANTS = ("ignores TERM", "has a child")
"""What is peculiar about the ranks; the child is a grandchild in a session of its own."""
NUM_RANKS_ALONE = 2
"""Ranks on one host; on several each has one."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell."""

    launcher: str
    num_hosts: int
    target: str
    """One of ``TARGETS``, or ``host``."""
    how: str
    """One of ``SIGNALS``, or of ``DISASTERS``."""
    variant: str

    @property
    def name(self) -> str:
        """Its name, unique in the matrix."""
        return f"{self.launcher}, {self.num_hosts} hosts, {self.target} {self.how}, rank {self.variant}"

    @property
    def num_ranks(self) -> int:
        """Ranks of its run."""
        return self.num_hosts if self.num_hosts > 1 else NUM_RANKS_ALONE

    @property
    def rank(self) -> int:
        """The rank it is about; the same cell of every launcher has the same. First and last ranks take turns."""
        turn = (*TARGETS, "host").index(self.target) + (*SIGNALS, *DISASTERS).index(self.how)
        return turn % self.num_ranks

    @property
    def host(self) -> int:
        """The host of that rank."""
        return self.rank if self.num_hosts > 1 else 0

    @property
    def signal(self) -> int | None:
        """Number of the signal."""
        return None if self.target == "host" else signal.Signals[f"SIG{self.how}"].value

    @property
    def goes_on(self) -> bool:
        """Whether nothing may come of it: the rank has chosen to ignore that signal."""
        return (self.target, self.how, self.variant) == ("rank", "TERM", "ignores TERM")

    @property
    def is_cancellation(self) -> bool:
        """Whether it asks our launcher to end the run, which is no failure and has no cause."""
        return self.target in ("parent", "agent") and self.how != "KILL"

    @property
    def exists(self) -> bool:
        """Whether the launcher has such a part: a bare torchrun on one host is its own parent."""
        if self.launcher == "ours":
            return True
        return self.target != "agent" and (self.launcher, self.num_hosts, self.target) != ("torchrun", 1, "parent")

    def is_right_code(self, code: int | None) -> bool:
        """Return whether ``code`` tells the truth; ``None`` stands for a launcher that never ended."""
        return code not in (None, 0) if self.signal is None else code == 128 + self.signal


def matrix() -> Iterator[Cell]:
    """Yield all cells, those with the same launcher and hosts together."""
    for launcher, num_hosts in itertools.product(LAUNCHERS, (1, 2, 3)):
        faults = [*itertools.product(TARGETS, SIGNALS)]
        if num_hosts > 1:
            faults += [("host", disaster) for disaster in DISASTERS]
        for (target, how), variant in itertools.product(faults, VARIANTS):
            cell = Cell(launcher=launcher, num_hosts=num_hosts, target=target, how=how, variant=variant)
            if cell.exists:
                yield cell
