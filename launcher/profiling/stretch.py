"""Recording the beginning of work that has no steps, for a limited time."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING

from launcher.profiling.base import Profiler

if TYPE_CHECKING:
    from launcher.profiling.recording import Recording


class StretchProfiler(Profiler):
    """Records from where it is entered until time is up or the work is over.

    torch's profiler has to be stopped by the thread that started it, wherever that is by then: a timer interrupts it.

    Args:
        recording: not yet prepared.
        seconds: how long at most.
    """

    def __init__(self, recording: Recording, *, seconds: float) -> None:
        self._recording, self._limit_s = recording, seconds
        self._started_at = 0.0

    def __enter__(self) -> Profiler:
        assert threading.current_thread() is threading.main_thread(), "timers interrupt the main thread"
        self._recording.start()
        self._started_at = time.perf_counter()
        signal.signal(signal.SIGALRM, self._time_is_up)
        signal.setitimer(signal.ITIMER_REAL, self._limit_s)
        return self

    def step(self) -> AbstractContextManager[None]:
        """Return what names a step in the trace: time is what counts."""
        return self.mark("step")

    def mark(self, name: str) -> AbstractContextManager[None]:
        """Name a stretch while somebody listens."""
        return self._recording.mark(name) if self._recording.is_on else super().mark(name)

    def close(self) -> None:
        """Write what there is, if time is not up yet."""
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if self._recording.is_on:
            seconds = time.perf_counter() - self._started_at
            self._recording.stop()
            print(f"profile: {seconds:.3g} s of {self._recording.name}: {self._recording.folder}", flush=True)

    def _time_is_up(self, number: int, frame: FrameType | None) -> None:
        self.close()
