"""Replicas of the engine: the least loaded gets the next request, a dead one is restarted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path

from launcher.errors import JobError
from launcher.inference.engine.base import EngineStats
from launcher.inference.engine.loop import (
    LENGTH_PREFIX,
    MAX_MESSAGE_BYTES,
    WireMessage,
    pack_message,
    request_to_wire,
    stats_from_wire,
    unpack_message,
    update_from_wire,
)
from launcher.inference.server.request_state import Draining, Failed, RequestState, TooLate
from launcher.utils.processes import Process, identify

_CONNECTION_LOST = "its link broke"
_TERMINATE_S = 3.0
"""Time that an engine gets to end once it is told to."""


class ReplicaClient:
    """An engine behind a connection.

    Args:
        number: which of the engines.
        connection: this end of the socket pair.
        process: what is at the other end, where it is a child of this process.
        on_ready: called when it can be given requests.
        on_lost: called when it is gone, with why.
    """

    def __init__(
        self,
        number: int,
        connection: socket.socket,
        *,
        process: subprocess.Popen[bytes] | None,
        on_ready: Callable[[ReplicaClient], None],
        on_lost: Callable[[ReplicaClient, str], None],
    ) -> None:
        self.number, self._connection, self._popen = number, connection, process
        self.process: Process | None = identify(process.pid) if process else None
        self._on_ready, self._on_lost = on_ready, on_lost
        self.flights: dict[str, RequestState] = {}
        self.stats = EngineStats()
        self.context: int | None = None
        """Most tokens of a sequence; known once it is ready."""
        self.failure: WireMessage | None = None
        """Why it could not be built, in its own words."""
        self.phase = "start"
        self.started_at = self.heard_at = time.monotonic()
        self._progress_at = self.heard_at
        self._is_ending = False
        self._writer: asyncio.StreamWriter | None = None
        self._task = asyncio.get_running_loop().create_task(self._serve())

    @property
    def is_ready(self) -> bool:
        """Whether it can be given requests."""
        return self.context is not None and self._writer is not None

    @property
    def stuck_s(self) -> float:
        """For how long it has had something to do and done nothing; before it is ready, for how long it is silent."""
        return time.monotonic() - (self._progress_at if self.is_ready else self.heard_at)

    def give(self, flight: RequestState) -> None:
        """Hand it a request."""
        now = time.monotonic()
        if not self.flights:
            self._progress_at = now
        flight.lives += 1
        self.flights[flight.request.id] = flight
        waited, request = now - flight.times.arrived, flight.request
        # whoever was begun by an engine that died has waited its turn already
        in_queue_s = None if flight.times.begun is not None else _left(request.queue_deadline_s, waited)
        self._send(
            {
                "kind": "add",
                "request": request_to_wire(
                    replace(
                        request,
                        queue_deadline_s=in_queue_s,
                        deadline_s=_left(request.deadline_s, waited),
                    )
                ),
            }
        )

    def cancel(self, flight: RequestState) -> None:
        """Have it let go of a request, before its next step."""
        if self.flights.pop(flight.request.id, None) is not None:
            self._send({"kind": "cancel", "request": flight.request.id})

    def kill(self) -> None:
        """End it at once; ``on_lost`` follows."""
        if self.process is not None:
            self.process.send(signal.SIGKILL)

    async def end(self) -> None:
        """Let it end in peace, and see that it does."""
        self._is_ending = True
        self._send({"kind": "end"})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._task), _TERMINATE_S)
        self.kill()
        await self._task

    async def _serve(self) -> None:
        """Read what it says until it is gone."""
        reader, self._writer = await asyncio.open_connection(sock=self._connection, limit=1 << 20)
        why = _CONNECTION_LOST
        try:
            while True:
                (length,) = LENGTH_PREFIX.unpack(await reader.readexactly(LENGTH_PREFIX.size))
                if length > MAX_MESSAGE_BYTES:
                    why = f"it sent a frame of {length} bytes"
                    break
                self._hear(unpack_message(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:  # noqa: BLE001  (whoever talks nonsense is as lost as who says nothing)
            why = f"it sent what nobody understands ({error!r})"
        finally:
            self._writer.close()
            self._writer = None
        if self._popen is not None:
            if not self._is_ending:
                self.kill()
            code = await asyncio.to_thread(self._popen.wait)
            if why == _CONNECTION_LOST:
                how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
                why = f"it ended {how}"
        if not self._is_ending:
            self._on_lost(self, why)

    def _hear(self, message: WireMessage) -> None:
        self.heard_at = time.monotonic()
        match message["kind"]:
            case "step":
                self._progress_at = self.heard_at
                self.stats = stats_from_wire(message["stats"])
                for row in message["updates"]:
                    update = update_from_wire(row)
                    flight = self.flights.get(update.request)
                    if flight is None:  # cancelled meanwhile
                        continue
                    if update.finish is not None:
                        del self.flights[update.request]
                    flight.hear(update)
            case "refused":
                if flight := self.flights.pop(message["request"], None):
                    flight.reject(message["field"], message["why"])
            case "ready":
                self.context = message["context"]
                self._progress_at = self.heard_at
                self._on_ready(self)
            case "heartbeat":
                self.phase = message["phase"]
            case "failed":
                self.failure = message
            case kind:
                raise AssertionError(f"no engine says {kind}")

    def _send(self, message: WireMessage) -> None:
        if self._writer is not None:  # else it is lost, and whoever asks is told so in a moment
            self._writer.write(pack_message(message))


def start_replica(
    run_dir: Path, number: int, *, environ: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start an engine's process; return it and this end of its link. Call it in the main thread, which it dies with."""
    ours, theirs = socket.socketpair()
    with theirs:
        words = (str(run_dir), str(number), str(theirs.fileno()), str(os.getpid()))
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.inference.server.replica", *words],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    ours.setblocking(False)
    return process, ours


def _left(deadline_s: float | None, waited_s: float) -> float | None:
    return None if deadline_s is None else max(0.001, deadline_s - waited_s)


_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.25, 30.0
"""Before a lost engine is started anew; the pause doubles while it is lost again soon."""
_HEALTHY_S = 60.0
"""An engine that lived so long was well."""
_MAX_ATTEMPTS = 3
"""Engines that one request may be on: one that kills engines must not go round for ever."""
_TICK_S = 0.25
_DEADLINE_MARGIN_S = 1.0
"""After the end of its time, for an engine to say so itself."""
StartReplica = Callable[[int, "ReplicaPool"], ReplicaClient]


class ReplicaPool:
    """The engines and what waits for them. Everything happens in one event loop.

    Args:
        size: number of engines.
        start: starts the engine of a number, reporting to the pool.
        stall_s: see ``Serve.stall_s``.
        building_s: silence after which an engine that is being built counts as stuck; 0 waits for ever.
    """

    def __init__(self, size: int, start: StartReplica, *, stall_s: float, building_s: float) -> None:
        self._size, self._start, self._stall_s, self._building_s = size, start, stall_s, building_s
        self._engines: dict[int, ReplicaClient] = {}
        self._where: dict[str, ReplicaClient] = {}
        self._waiting: deque[RequestState] = deque()
        self._pauses: dict[int, float] = {}
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.Task[None] | None = None
        self._is_closing = False
        self._past = EngineStats()
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
    def engines(self) -> list[ReplicaClient]:
        """All engines that are there."""
        return list(self._engines.values())

    def stats(self) -> list[EngineStats]:
        """Return where each engine stands."""
        return [engine.stats for engine in self._engines.values()]

    def totals(self) -> EngineStats:
        """Return what all engines have done, those that were lost included; counts alone mean something."""
        return reduce(_sum_totals, self.stats(), self._past)

    @property
    def num_unplaced(self) -> int:
        """Requests that wait for some engine to be ready."""
        return len(self._waiting)

    def submit(self, flight: RequestState) -> None:
        """Give a request to the engine with the fewest, or keep it until there is one."""
        able = [engine for engine in self._engines.values() if engine.is_ready]
        calm = [engine for engine in able if not (engine.flights and engine.stuck_s > self._stall_s)]
        if not able:
            self._waiting.append(flight)
            return
        best = min(calm or able, key=lambda engine: (len(engine.flights), engine.stats.kv_cache_tokens))
        self._where[flight.request.id] = best
        best.give(flight)

    def forget(self, flight: RequestState) -> None:
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

    def on_ready(self, engine: ReplicaClient) -> None:
        """Take that an engine can be given requests."""
        self.context = engine.context
        waiting, self._waiting = self._waiting, deque()
        for flight in waiting:
            self.submit(flight)

    def on_lost(self, engine: ReplicaClient, why: str) -> None:
        """Give what was on a lost engine to others, or tell who waits for it; start it anew."""
        if self._is_closing:
            return
        was_ready = engine.context is not None
        if not was_ready and self.context is None:
            self._break(engine, why)
            return
        print(f"engine {engine.number} is lost: {why}; it is started anew", flush=True)
        del self._engines[engine.number]
        self._past = _sum_totals(self._past, engine.stats)
        for flight in list(engine.flights.values()):
            self._where.pop(flight.request.id, None)
            self._rescue(flight)
        self._restart(engine)

    def _rescue(self, flight: RequestState) -> None:
        if flight.ended:
            return
        if flight.lives >= _MAX_ATTEMPTS:
            flight.fail(Failed(f"{flight.lives} engines were lost with this request on them"))
        elif flight.is_untouched or flight.request.sampling.is_deterministic:
            flight.start_over()
            self.submit(flight)
        else:
            flight.fail(Failed("the engine was lost when part of an unrepeatable result was there; ask again"))

    def _restart(self, engine: ReplicaClient) -> None:
        lived_s = time.monotonic() - engine.started_at
        before = self._pauses.get(engine.number, 0.0)
        pause_s = _MIN_BACKOFF_S if lived_s > _HEALTHY_S or not before else min(2 * before, _MAX_BACKOFF_S)
        self._pauses[engine.number] = pause_s
        self.restarts += 1
        self._loop.call_later(pause_s, self._begin, engine.number)

    def _begin(self, number: int) -> None:
        if not self._is_closing:
            self._engines[number] = self._start(number, self)

    def _break(self, engine: ReplicaClient, why: str) -> None:
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
                if limit is not None and now - flight.times.arrived > limit + _DEADLINE_MARGIN_S:
                    flight.fail(TooLate(while_queued=flight.times.begun is None))


def _sum_totals(one: EngineStats, other: EngineStats) -> EngineStats:
    """Return the sum of what only grows."""
    names = [field.name for field in fields(EngineStats) if field.name.endswith("_total")]
    return EngineStats(**{name: getattr(one, name) + getattr(other, name) for name in names})
