"""Recording a window of steps, and saying what that cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from launcher.profiling.base import Profiler

if TYPE_CHECKING:
    from launcher.profile import Window
    from launcher.profiling.recording import Recording


class WindowProfiler(Profiler):
    """Records the steps of a window; as many steps after it tell what one takes without.

    The step that follows the window at once is no such: there ranks wait for those that still write.

    Args:
        recording: not yet prepared.
        window: which steps.
        what: what a step is called.
    """

    def __init__(self, recording: Recording, window: Window, *, what: str) -> None:
        self._recording, self._window, self._what = recording, window, what
        self._seconds: list[float] = []
        """Of each step that has ended, until there are enough of them."""
        self._has_told = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Have one step done."""
        if self._has_told:
            yield
            return
        self._before(len(self._seconds) + 1)
        started = time.perf_counter()
        with self.mark(self._what):
            yield
        self._seconds.append(time.perf_counter() - started)
        self._after(len(self._seconds))

    def mark(self, name: str) -> AbstractContextManager[None]:
        """Name a stretch while somebody listens."""
        return self._recording.mark(name) if self._recording.is_on else super().mark(name)

    def close(self) -> None:
        """Write what there is, if the window is still open."""
        if self._has_told:
            return
        if self._recording.is_on:
            self._recording.stop()
        else:
            self._recording.cancel()
        self._tell()

    def _before(self, step: int) -> None:
        if step == self._window.wait + 1:
            self._recording.prepare()
        if step == self._window.first:
            self._recording.start()

    def _after(self, step: int) -> None:
        if step == self._window.last:
            self._recording.stop()
        if step == self._window.last + 1 + self._window.active:
            self._tell()

    def _tell(self) -> None:
        self._has_told = True
        window, name = self._window, self._recording.name
        recorded = self._seconds[window.first - 1 : window.last]
        plain = self._seconds[window.last + 1 :]
        if not recorded:
            steps = f"{len(self._seconds)} {self._what}s"
            print(f"profile: {name} took {steps} and records from number {window.first} on", flush=True)
            return
        told = f"{self._what}s {window.first} to {window.first + len(recorded) - 1} of {name}"
        cost = f"{statistics.median(recorded):.3g} s each"
        if plain:
            cost += f", {statistics.median(plain):.3g} s with the profiler off"
        print(f"profile: {told}, {cost}: {self._recording.folder}", flush=True)
