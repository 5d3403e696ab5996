"""What is seen of a server from outside while it is under load: memory, readiness; and engines killed meanwhile."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import psutil
from soak_server import SoakServer

_EVERY_S = 1.0
_SETTLED_S = 45.0
"""Age from which on an engine's memory counts."""
_SILENT_S = 20.0
"""A server that says it is ready, and finishes nothing for so long, lies."""
_FLAT = 0.05
_LEAST_SAMPLES = 20


class Watch:
    """A thread that looks, and kills.

    Args:
        server: whom to watch.
        kill_every_s: seconds between engines that are killed, the oldest first; 0 kills none.
        finished: how many answers have come so far.
    """

    def __init__(self, server: SoakServer, *, kill_every_s: float, finished: Callable[[], int]) -> None:
        self._server, self._kill_every_s, self._finished = server, kill_every_s, finished
        self._memory: dict[str, list[tuple[float, float]]] = {"front": [], "engine": []}
        self._kills = self._not_ready = self._looks = 0
        self._longest_silence_s = 0.0
        self._back_s: list[float] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()

    @property
    def is_honest(self) -> bool:
        """Whether it never said that it was ready while it finished nothing for long."""
        return self._longest_silence_s <= _SILENT_S

    @property
    def is_flat(self) -> bool:
        """Whether memory at the end is what it was at the beginning, within 5 percent."""
        return all(abs(change) <= _FLAT for change in self._changes().values())

    def lines(self) -> Iterator[str]:
        """Yield what was seen."""
        yield f"engines killed: {self._kills}; back after {', '.join(f'{seconds:.0f} s' for seconds in self._back_s)}"
        yield f"not ready at {self._not_ready} of {self._looks} looks"
        yield f"longest time ready without finishing anything: {self._longest_silence_s:.0f} s"
        for name, change in self._changes().items():
            values = [size for _, size in self._memory[name]]
            middle = statistics.median(values) / 2**20
            yield f"memory of {name}: median {middle:.0f} MiB, from first to last quarter {change:+.1%}"

    def _changes(self) -> dict[str, float]:
        """Return by how much the median of the last quarter differs from that of the first, after warm-up."""
        found = {}
        for name, samples in self._memory.items():
            values = [size for _, size in samples[len(samples) // 10 :]]
            if len(values) >= _LEAST_SAMPLES:
                quarter = len(values) // 4
                found[name] = statistics.median(values[-quarter:]) / statistics.median(values[:quarter]) - 1
        return found

    def _run(self) -> None:
        started = kill_at = time.monotonic()
        kill_at += self._kill_every_s
        finished, since = self._finished(), started
        killed_at: float | None = None
        while not self._ending.wait(_EVERY_S):
            now = time.monotonic()
            engines = self._server.engines()
            is_ready = self._server.get("/health/ready")[0] == 200
            self._looks += 1
            self._not_ready += not is_ready
            if self._finished() != finished or not is_ready:
                finished, since = self._finished(), now
            self._longest_silence_s = max(self._longest_silence_s, now - since)
            self._note_memory(engines, now - started)
            if killed_at is not None and is_ready and len(engines) >= self._server.replicas:
                self._back_s.append(now - killed_at)
                killed_at = None
            if self._kill_every_s and now >= kill_at and engines:
                engines[0].kill()
                self._kills, killed_at, kill_at = self._kills + 1, now, now + self._kill_every_s

    def _note_memory(self, engines: list[psutil.Process], at_s: float) -> None:
        pids = {engine.pid for engine in engines}
        front = 0
        for process in self._server.processes():
            try:
                size, age_s = process.memory_info().rss, time.time() - process.create_time()
            except psutil.Error:
                continue
            if process.pid not in pids:
                front += size
            elif age_s > _SETTLED_S:
                self._memory["engine"].append((at_s, size))
        self._memory["front"].append((at_s, front))
