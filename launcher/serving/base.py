"""What every generation engine can do; servers and jobs know no more of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from launcher.profiling.base import NO_PROFILER, Profiler
from launcher.serving.values import Request, Stats, Update


class Generator(ABC):
    """Continues many sequences at once. One thread calls it; nothing in it waits but ``step``."""

    profiler: Profiler = NO_PROFILER
    """Whatever is computed in this process is computed in steps of it; may be set at any time between two."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            Refused: it can never be served: longer than the context or the room for keys and values, an id outside
                the vocabulary, a way of sampling that this engine or model lacks.
        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """End a request before the next step; its last update says ``cancelled``. Unknown ones are let be."""

    @abstractmethod
    def step(self) -> Sequence[Update]:
        """Go one step further with whatever is most due; returns at once, with nothing, where nothing is to be done."""

    @abstractmethod
    def stats(self) -> Stats:
        """Return where it stands."""

    @abstractmethod
    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run once through each shape (sequences, tokens), so that no request pays for first times."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; requests still in it get no further update."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Most tokens of a sequence, prompt and output together."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        stats = self.stats()
        return not stats.running and not stats.waiting
