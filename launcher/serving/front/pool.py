"""All engines of a server: the least loaded one gets the next request, a dead one is started anew."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from functools import reduce

from launcher.errors import JobError
from launcher.serving.front.flight import Draining, Failed, Flight, TooLate
from launcher.serving.front.remote import Remote
from launcher.serving.values import Stats

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0
"""Before a lost engine is started anew; the pause doubles while it is lost again soon."""
_WELL_S = 60.0
"""An engine that lived so long was well."""
_LIVES = 3
"""Engines that one request may be on: one that kills engines must not go round for ever."""
_TICK_S = 0.25
_LATE_S = 1.0
"""After the end of its time, for an engine to say so itself."""

Start = Callable[[int, "Pool"], Remote]


class Pool:
    """The engines and what waits for them. Everything happens in one event loop.

    Args:
        size: number of engines.
        start: starts the engine of a number, reporting to the pool.
        stall_s: see ``Serve.stall_s``.
        building_s: silence after which an engine that is being built counts as stuck; 0 waits for ever.
    """

    def __init__(self, size: int, start: Start, *, stall_s: float, building_s: float) -> None:
        self._size, self._start, self._stall_s, self._building_s = size, start, stall_s, building_s
        self._engines: dict[int, Remote] = {}
        self._where: dict[str, Remote] = {}
        self._waiting: deque[Flight] = deque()
        self._pauses: dict[int, float] = {}
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.Task[None] | None = None
        self._is_closing = False
        self._past = Stats()
        self.restarts = 0
        self.broken: asyncio.Future[None] = self._loop.create_future()
        """Gets the exception that keeps the engines from ever being built."""
        self.context: int | None = None

    def open(self) -> None:
        """Start every engine."""
        for number in range(self._size):
            self._engines[number] = self._start(number, self)
        self._watch = self._loop.create_task(self._look())

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + sum(len(engine.flights) for engine in self._engines.values())

    @property
    def ready(self) -> int:
        """Engines that can be given requests and are not stuck."""
        return sum(
            engine.is_ready and not (engine.flights and engine.stuck_s > self._stall_s)
            for engine in self._engines.values()
        )

    @property
    def engines(self) -> list[Remote]:
        """All engines that are there."""
        return list(self._engines.values())

    def stats(self) -> list[Stats]:
        """Return where each engine stands."""
        return [engine.stats for engine in self._engines.values()]

    def totals(self) -> Stats:
        """Return what all engines have done, those that were lost included; counts alone mean something."""
        return reduce(_added, self.stats(), self._past)

    @property
    def num_unplaced(self) -> int:
        """Requests that wait for some engine to be ready."""
        return len(self._waiting)

    def submit(self, flight: Flight) -> None:
        """Give a request to the engine with the fewest, or keep it until there is one."""
        able = [engine for engine in self._engines.values() if engine.is_ready]
        calm = [engine for engine in able if not (engine.flights and engine.stuck_s > self._stall_s)]
        if not able:
            self._waiting.append(flight)
            return
        best = min(calm or able, key=lambda engine: (len(engine.flights), engine.stats.kv_tokens))
        self._where[flight.request.id] = best
        best.give(flight)

    def forget(self, flight: Flight) -> None:
        """Let go of a request that has ended, or that nobody waits for."""
        if (engine := self._where.pop(flight.request.id, None)) is not None:
            engine.cancel(flight)
        elif flight in self._waiting:
            self._waiting.remove(flight)

    def fail_all(self) -> int:
        """End everything that is left because the server ends; return how much that was."""
        left = [*self._waiting, *(flight for engine in self.engines for flight in engine.flights.values())]
        for flight in left:
            flight.fail(Draining("the server is ending"))
        return len(left)

    async def close(self) -> None:
        """End every engine."""
        self._is_closing = True
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(engine.end() for engine in self.engines))

    def on_ready(self, engine: Remote) -> None:
        """Take that an engine can be given requests."""
        self.context = engine.context
        waiting, self._waiting = self._waiting, deque()
        for flight in waiting:
            self.submit(flight)

    def on_lost(self, engine: Remote, why: str) -> None:
        """Give what was on a lost engine to others, or tell who waits for it; start it anew."""
        if self._is_closing:
            return
        was_ready = engine.context is not None
        if not was_ready and self.context is None:
            self._break(engine, why)
            return
        print(f"engine {engine.number} is lost: {why}; it is started anew", flush=True)
        del self._engines[engine.number]
        self._past = _added(self._past, engine.stats)
        for flight in list(engine.flights.values()):
            self._where.pop(flight.request.id, None)
            self._rescue(flight)
        self._restart(engine)

    def _rescue(self, flight: Flight) -> None:
        if flight.ended:
            return
        if flight.lives >= _LIVES:
            flight.fail(Failed(f"{flight.lives} engines were lost with this request on them"))
        elif flight.is_untouched or flight.request.sampling.repeatable:
            flight.start_over()
            self.submit(flight)
        else:
            flight.fail(Failed("the engine was lost when part of an unrepeatable result was there; ask again"))

    def _restart(self, engine: Remote) -> None:
        lived_s = time.monotonic() - engine.started_at
        before = self._pauses.get(engine.number, 0.0)
        pause_s = _FIRST_PAUSE_S if lived_s > _WELL_S or not before else min(2 * before, _LONGEST_PAUSE_S)
        self._pauses[engine.number] = pause_s
        self.restarts += 1
        self._loop.call_later(pause_s, self._begin, engine.number)

    def _begin(self, number: int) -> None:
        if not self._is_closing:
            self._engines[number] = self._start(number, self)

    def _break(self, engine: Remote, why: str) -> None:
        """End the run: what could not be built once will not be built the next time."""
        if self.broken.done():
            return
        said = engine.failure["why"] if engine.failure else f"engine {engine.number} could not be started: {why}"
        code = int(engine.failure["code"]) if engine.failure else 1
        self.broken.set_exception(JobError(said, exit_code=code))

    async def _look(self) -> None:
        """Notice engines that do nothing, and requests whose time is up though no engine says so."""
        while True:
            await asyncio.sleep(_TICK_S)
            for engine in self.engines:
                if engine.process is None:  # ranks, not ours to end: their launcher sees when they hang
                    continue
                limit = 2 * self._stall_s if engine.is_ready else self._building_s
                if limit and engine.stuck_s > limit and (engine.flights or not engine.is_ready):
                    print(f"engine {engine.number} has done nothing for {engine.stuck_s:.0f} s", flush=True)
                    engine.kill()
            self._tell_who_is_late()

    def _tell_who_is_late(self) -> None:
        """End requests whose time is up: those that no engine has, and those whose engine does not say so itself."""
        now = time.monotonic()
        for flight in list(self._waiting):
            request, waited = flight.request, now - flight.times.arrived
            in_queue_s = request.queue_deadline_s if flight.times.begun is None else None
            if waited > min(in_queue_s or waited, request.deadline_s or waited):
                flight.fail(TooLate(while_queued=flight.times.begun is None))
        for engine in self.engines:
            for flight in list(engine.flights.values()):
                limit = flight.request.deadline_s
                if limit is not None and now - flight.times.arrived > limit + _LATE_S:
                    flight.fail(TooLate(while_queued=flight.times.begun is None))


def _added(one: Stats, other: Stats) -> Stats:
    """Return the sum of what only grows."""
    names = [field.name for field in fields(Stats) if field.name.endswith("_total")]
    return Stats(**{name: getattr(one, name) + getattr(other, name) for name in names})
