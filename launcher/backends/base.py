"""What every backend has in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from launcher.component import Component
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.supervise.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Backend(Component):
    """A way to start a plan and to stay with it until it ends."""

    group: ClassVar[str] = "backend"

    ranks: int | Literal["auto"] = "auto"
    """Ranks on each host; ``auto`` is one per visible GPU, else 2 where there are two cores."""

    agent: Literal["torchrun", "deepspeed"] = "torchrun"
    """Which launcher starts the ranks of one host."""

    port: int | Literal["auto"] = "auto"
    """Port of the rendezvous; ``auto`` finds a free one for each run and another if it is taken meanwhile."""

    threads: int | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each rank; ``auto`` shares the cores of the host among its ranks."""

    env: dict[str, str] = field(default_factory=dict)
    """Environment variables added to every rank."""

    show_ranks: tuple[int, ...] | Literal["all"] = "all"
    """Ranks whose output is shown; logs hold every rank's."""

    stall_timeout_s: float = 600.0
    """A rank that reports no progress for this long gets every stack dumped and ends the run; 0 waits for ever."""

    grace_s: float = 10.0
    """Time between asking the ranks to end and killing what is left."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse counts and times that cannot be."""
        yield from self.below(1, "ranks", "threads")
        yield from self.below(0, "stall_timeout_s", "grace_s")
        if self.port != "auto" and not 1024 <= self.port <= 65535:
            yield self.refuse("port", "must lie between 1024 and 65535", "set backend.port=auto")

    @abstractmethod
    def submit(self, plan: Plan) -> Outcome:
        """Start ``plan``, stay until nothing of it is left, and return how it ended.

        Writes nothing about the end: whoever tries again on another port, or gives up, calls ``conclude``.
        """
