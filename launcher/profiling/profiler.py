"""Profilers: record a window of steps, or a limited time, with torch's profiler; or nothing."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from launcher.config.profile import Profile, ProfileUnit, TorchProfile

if TYPE_CHECKING:
    from launcher.config.profile import ProfileWindow
    from launcher.profiling.recording import Recording


_NOTHING = nullcontext()


class Profiler(ABC):
    """Records some of the steps that it is given, as the options say."""

    @abstractmethod
    def step(self) -> AbstractContextManager[None]:
        """Return the context of one step."""

    @abstractmethod
    def close(self) -> None:
        """End the recording and write it.

        May be called again.
        """

    def mark(self, name: str) -> AbstractContextManager[None]:
        """Return a context whose work is a range of this name in the trace."""
        return _NOTHING

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:  # else the process ends for another reason, which a profile must not hide or delay
            self.close()


class NoProfiler(Profiler):
    """Records nothing."""

    def step(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return _NOTHING

    def close(self) -> None:
        """Go on."""


NO_PROFILER = NoProfiler()


class WindowProfiler(Profiler):
    """Records the steps of a window; as many steps after it tell what one takes without.

    The step that follows the window at once is no such: there ranks wait for those that still write.

    Args:
        recording: not yet prepared.
        window: which steps.
        what: what a step is called.
    """

    def __init__(self, recording: Recording, window: ProfileWindow, *, what: str) -> None:
        self._recording, self._window, self._what = recording, window, what
        self._seconds: list[float] = []
        """Of each step that has ended, until there are enough of them."""
        self._is_reported = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Have one step done."""
        if self._is_reported:
            yield
            return
        self._before(len(self._seconds) + 1)
        started = time.perf_counter()
        with self.mark(self._what):
            yield
        self._seconds.append(time.perf_counter() - started)
        self._after(len(self._seconds))

    def mark(self, name: str) -> AbstractContextManager[None]:
        """Name a part of the work in the trace, while a trace is recorded."""
        return self._recording.mark(name) if self._recording.is_on else super().mark(name)

    def close(self) -> None:
        """Write the recording, if the window is still open."""
        if self._is_reported:
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
        self._is_reported = True
        window, name = self._window, self._recording.name
        recorded = self._seconds[window.first - 1 : window.last]
        plain = self._seconds[window.last + 1 :]
        if not recorded:
            steps = f"{len(self._seconds)} {self._what}s"
            print(f"profile: {name} took {steps} and records from number {window.first} on", flush=True)
            return
        steps = f"{self._what}s {window.first} to {window.first + len(recorded) - 1} of {name}"
        cost = f"{statistics.median(recorded):.3g} s each"
        if plain:
            cost += f", {statistics.median(plain):.3g} s with the profiler off"
        print(f"profile: {steps}, {cost}: {self._recording.folder}", flush=True)


class TimedProfiler(Profiler):
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
        """Return the context that names a step in the trace.

        The time limit ends the recording, not the number of steps.
        """
        return self.mark("step")

    def mark(self, name: str) -> AbstractContextManager[None]:
        """Name a part of the work in the trace, while a trace is recorded."""
        return self._recording.mark(name) if self._recording.is_on else super().mark(name)

    def close(self) -> None:
        """Write the recording, if time is not up yet."""
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if self._recording.is_on:
            seconds = time.perf_counter() - self._started_at
            self._recording.stop()
            print(f"profile: {seconds:.3g} s of {self._recording.name}: {self._recording.folder}", flush=True)

    def _time_is_up(self, number: int, frame: FrameType | None) -> None:
        self.close()


def make_profiler(profile: Profile, *, unit: ProfileUnit, folder: Path, name: str) -> Profiler:
    """Return the profiler of this process.

    Args:
        profile: the run's.
        unit: what the recording is measured in.
        folder: where its files go; made once there are any.
        name: of this process, with which its files begin (``rank0``).
    """
    if not isinstance(profile, TorchProfile) or unit == "cases":
        return NO_PROFILER
    from launcher.profiling.recording import Recording

    recording = Recording(profile, folder=folder, name=name)
    if unit == "time":
        return TimedProfiler(recording, seconds=profile.seconds)
    return WindowProfiler(recording, profile.window(unit), what=unit.removesuffix("s"))
