"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from launcher.profiling.base import NO_PROFILER, Profiler

if TYPE_CHECKING:
    from launcher.supervise.heartbeat import Heartbeat


class Clock:
    """Times the phases of a step and tells the heartbeat which one begins.

    On a GPU kernels run behind the host, so each phase is bracketed by CUDA events and read once, at the end of the
    step, after the loss has been fetched: timing adds no synchronisation of its own.

    Args:
        heartbeat: told which phase begins.
        cuda: whether there is a GPU to wait for.
        profiler: finds the phases by name in its trace.
    """

    def __init__(self, heartbeat: Heartbeat, *, cuda: bool, profiler: Profiler = NO_PROFILER) -> None:
        self._heartbeat, self._cuda, self._profiler = heartbeat, cuda, profiler
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, object, object]] = []
        self.step = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block as part of ``name``; the same name may come several times in a step."""
        self._heartbeat.beat(name, self.step)
        with self._profiler.mark(name), self._between_events(name) if self._cuda else self._on_host(name):
            yield

    @contextmanager
    def _on_host(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    @contextmanager
    def _between_events(self, name: str) -> Iterator[None]:
        import torch

        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        try:
            yield
        finally:
            after.record()
            self._events.append((name, before, after))

    def take(self) -> dict[str, float]:
        """Return seconds by phase since the last call, and start anew."""
        for name, before, after in self._events:
            after.synchronize()  # type: ignore[attr-defined]
            self._seconds[name] += before.elapsed_time(after) / 1000  # type: ignore[attr-defined]
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds
