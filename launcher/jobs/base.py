"""What every job has in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.component import Component

if TYPE_CHECKING:
    from launcher.context import Context


@dataclass(frozen=True, kw_only=True)
class Job(Component):
    """One piece of work that every rank of a run does together."""

    group: ClassVar[str] = "job"

    seed: int = 0
    """Seed of weights, sample order and sampling. The same seed gives the same samples on any number of ranks."""

    @abstractmethod
    def run(self, context: Context) -> None:
        """Do the work on this rank; raise to fail the run."""
