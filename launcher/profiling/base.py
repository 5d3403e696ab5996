"""What a job tells whoever records it; without ``profile=true`` that is nobody."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

_NOTHING = nullcontext()


class Profiler(ABC):
    """Is told which stretches of work are steps, and decides by itself which of them it records."""

    @abstractmethod
    def step(self) -> AbstractContextManager[None]:
        """Return what one step is done in."""

    @abstractmethod
    def close(self) -> None:
        """Say that the work is over: what is still being recorded ends, and is written. May be called again."""

    def mark(self, name: str) -> AbstractContextManager[None]:
        """Return what a stretch is done in that has this name in the trace."""
        return _NOTHING

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:  # else the process ends for another reason, which a profile must not hide or delay
            self.close()


class NoProfiler(Profiler):
    """Records nothing."""

    def step(self) -> AbstractContextManager[None]:
        """Return what does nothing."""
        return _NOTHING

    def close(self) -> None:
        """Go on."""


NO_PROFILER = NoProfiler()
