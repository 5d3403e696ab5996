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
    AddRequest,
    BuildFailed,
    BuildPhase,
    CancelRequest,
    EngineMessage,
    EngineReady,
    RequestRefused,
    Shutdown,
    StepOutputs,
    pack_message,
    unpack_message,
)
from launcher.inference.server.request_state import DeadlineExceeded, GenerationFailed, RequestState, ServerDraining
from launcher.utils.processes import Process, identify

_CONNECTION_LOST = "its connection broke"
_TERMINATE_S = 3.0
"""Time that an engine gets to end after the ``shutdown`` message."""


class ReplicaClient:
    """An engine behind a connection.

    Args:
        number: which of the engines.
        connection: this end of the socket pair.
        process: at the other end, where it is a child of this process.
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
        self.requests: dict[str, RequestState] = {}
        self.stats = EngineStats()
        self.max_model_len: int | None = None
        """Longest sequence; known once it is ready."""
        self.failure: BuildFailed | None = None
        """Its message about why it could not be built."""
        self.phase = "start"
        self.started_at = self.last_message_at = time.monotonic()
        self._progress_at = self.last_message_at
        self._is_ending = False
        self._writer: asyncio.StreamWriter | None = None
        self._task = asyncio.get_running_loop().create_task(self._serve())

    @property
    def is_ready(self) -> bool:
        """Whether it can be given requests."""
        return self.max_model_len is not None and self._writer is not None

    @property
    def stalled_s(self) -> float:
        """Return seconds without a step although it has requests, or without a message at start."""
        return time.monotonic() - (self._progress_at if self.is_ready else self.last_message_at)

    def submit(self, state: RequestState) -> None:
        """Send it a request."""
        now = time.monotonic()
        if not self.requests:
            self._progress_at = now
        state.num_attempts += 1
        self.requests[state.request.id] = state
        waited, request = now - state.times.arrived, state.request
        # a request that a lost engine had started has been through the queue already
        in_queue_s = None if state.times.started is not None else _left(request.queue_deadline_s, waited)
        request = replace(request, queue_deadline_s=in_queue_s, deadline_s=_left(request.deadline_s, waited))
        self._send(AddRequest(request=request))

    def cancel(self, state: RequestState) -> None:
        """Cancel a request before its next step."""
        if self.requests.pop(state.request.id, None) is not None:
            self._send(CancelRequest(request_id=state.request.id))

    def kill(self) -> None:
        """End it at once; ``on_lost`` follows."""
        if self.process is not None:
            self.process.send(signal.SIGKILL)

    async def shut_down(self) -> None:
        """Let it end, and kill it after a time limit."""
        self._is_ending = True
        self._send(Shutdown())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._task), _TERMINATE_S)
        self.kill()
        await self._task

    async def _serve(self) -> None:
        """Handle its messages until it is gone."""
        reader, self._writer = await asyncio.open_connection(sock=self._connection, limit=1 << 20)
        why = _CONNECTION_LOST
        try:
            while True:
                (length,) = LENGTH_PREFIX.unpack(await reader.readexactly(LENGTH_PREFIX.size))
                if length > MAX_MESSAGE_BYTES:
                    why = f"it sent a frame of {length} bytes"
                    break
                self._handle(unpack_message(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:  # noqa: BLE001  (an engine that sends invalid messages is lost)
            why = f"it sent an invalid message ({error!r})"
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

    def _handle(self, message: EngineMessage) -> None:
        self.last_message_at = time.monotonic()
        match message:
            case StepOutputs():
                self._progress_at = self.last_message_at
                self.stats = message.stats
                for output in message.outputs:
                    state = self.requests.get(output.request_id)
                    if state is None:  # cancelled meanwhile
                        continue
                    if output.finish_reason is not None:
                        del self.requests[output.request_id]
                    state.handle_output(output)
            case RequestRefused():
                if state := self.requests.pop(message.request_id, None):
                    state.reject(message.param, message.why)
            case EngineReady():
                self.max_model_len = message.max_model_len
                self._progress_at = self.last_message_at
                self._on_ready(self)
            case BuildPhase():
                self.phase = message.phase
            case BuildFailed():
                self.failure = message
            case _:
                raise AssertionError(f"engines send no {message}")

    def _send(self, message: EngineMessage) -> None:
        if self._writer is not None:  # else it is lost, and its requests fail in a moment
            self._writer.write(pack_message(message))


def start_replica(
    run_dir: Path, number: int, *, environ: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start an engine process; return it and its socket.

    It dies with the calling thread, which must be the main one.
    """
    local, remote = socket.socketpair()
    with remote:
        arguments = (str(run_dir), str(number), str(remote.fileno()), str(os.getpid()))
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.inference.server.replica", *arguments],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            pass_fds=[remote.fileno()],
        )
    local.setblocking(False)
    return process, local


def _left(deadline_s: float | None, waited_s: float) -> float | None:
    return None if deadline_s is None else max(0.001, deadline_s - waited_s)


_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.25, 30.0
"""Before a lost engine is restarted; the pause doubles each time that it is soon lost again."""
_HEALTHY_S = 60.0
"""An engine that ran for so long resets the pause."""
_MAX_ATTEMPTS = 3
"""Engines that one request may be submitted to.
A request that kills engines must not be retried forever."""
_TICK_S = 0.25
_DEADLINE_MARGIN_S = 1.0
"""After a deadline, for the engine to report it itself."""
StartReplica = Callable[[int, "ReplicaPool"], ReplicaClient]


class ReplicaPool:
    """The engines and the requests that wait for one. Everything runs in one event loop.

    Args:
        size: number of engines.
        start: starts the engine of a number, reporting to the pool.
        stall_s: see ``Serve.stall_s``.
        build_timeout_s: silence after which an engine that is being built counts as stuck; 0 waits indefinitely.
    """

    def __init__(self, size: int, start: StartReplica, *, stall_s: float, build_timeout_s: float) -> None:
        self._size, self._start, self._stall_s, self._build_timeout_s = size, start, stall_s, build_timeout_s
        self._engines: dict[int, ReplicaClient] = {}
        self._replica_of: dict[str, ReplicaClient] = {}
        self._waiting: deque[RequestState] = deque()
        self._pauses: dict[int, float] = {}
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.Task[None] | None = None
        self._is_closing = False
        self._past = EngineStats()
        self.restarts = 0
        self.broken: asyncio.Future[None] = self._loop.create_future()
        """Gets the exception that keeps the engines from ever being built."""
        self.max_model_len: int | None = None

    def open(self) -> None:
        """Start every engine."""
        for number in range(self._size):
            self._engines[number] = self._start(number, self)
        self._watch = self._loop.create_task(self._monitor())

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + sum(len(engine.requests) for engine in self._engines.values())

    @property
    def ready(self) -> int:
        """Engines that accept requests and make progress."""
        return sum(
            engine.is_ready and not (engine.requests and engine.stalled_s > self._stall_s)
            for engine in self._engines.values()
        )

    @property
    def engines(self) -> list[ReplicaClient]:
        """All engines that are there."""
        return list(self._engines.values())

    def stats(self) -> list[EngineStats]:
        """Return the counts of each engine."""
        return [engine.stats for engine in self._engines.values()]

    def totals(self) -> EngineStats:
        """Return the totals of all engines, lost ones included."""
        return reduce(_sum_totals, self.stats(), self._past)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for some engine to be ready."""
        return len(self._waiting)

    def submit(self, state: RequestState) -> None:
        """Submit a request to the engine with the fewest requests, or queue it until one is ready."""
        ready = [engine for engine in self._engines.values() if engine.is_ready]
        responsive = [engine for engine in ready if not (engine.requests and engine.stalled_s > self._stall_s)]
        if not ready:
            self._waiting.append(state)
            return
        best = min(responsive or ready, key=lambda engine: (len(engine.requests), engine.stats.kv_cache_tokens))
        self._replica_of[state.request.id] = best
        best.submit(state)

    def release(self, state: RequestState) -> None:
        """Remove a request that has ended, and cancel it at its engine."""
        if (engine := self._replica_of.pop(state.request.id, None)) is not None:
            engine.cancel(state)
        elif state in self._waiting:
            self._waiting.remove(state)

    def fail_all(self) -> int:
        """Fail all requests because the server ends; return their number."""
        left = [*self._waiting, *(state for engine in self.engines for state in engine.requests.values())]
        for state in left:
            state.fail(ServerDraining("the server is ending"))
        return len(left)

    async def close(self) -> None:
        """End every engine."""
        self._is_closing = True
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(engine.shut_down() for engine in self.engines))

    def on_ready(self, engine: ReplicaClient) -> None:
        """Submit waiting requests to an engine that has become ready."""
        self.max_model_len = engine.max_model_len
        waiting, self._waiting = self._waiting, deque()
        for state in waiting:
            self.submit(state)

    def on_lost(self, engine: ReplicaClient, why: str) -> None:
        """Retry or fail the requests of a lost engine; restart it."""
        if self._is_closing:
            return
        was_ready = engine.max_model_len is not None
        if not was_ready and self.max_model_len is None:
            self._fail(engine, why)
            return
        print(f"engine {engine.number} is lost: {why}; it is restarted", flush=True)
        del self._engines[engine.number]
        self._past = _sum_totals(self._past, engine.stats)
        for state in list(engine.requests.values()):
            self._replica_of.pop(state.request.id, None)
            self._retry(state)
        self._restart(engine)

    def _retry(self, state: RequestState) -> None:
        if state.is_done:
            return
        if state.num_attempts >= _MAX_ATTEMPTS:
            state.fail(GenerationFailed(f"{state.num_attempts} engines were lost while they processed this request"))
        elif state.has_no_tokens or state.request.sampling.is_deterministic:
            state.replay()
            self.submit(state)
        else:
            state.fail(
                GenerationFailed("the engine was lost after part of a sampled result was sent; retry the request")
            )

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

    def _fail(self, engine: ReplicaClient, why: str) -> None:
        """End the run: an engine that cannot be built will not be built the next time."""
        if self.broken.done():
            return
        said = engine.failure.why if engine.failure else f"engine {engine.number} could not be started: {why}"
        code = engine.failure.code if engine.failure else 1
        self.broken.set_exception(JobError(said, exit_code=code))

    async def _monitor(self) -> None:
        """Kill engines that stall, and end requests whose deadline has passed."""
        while True:
            await asyncio.sleep(_TICK_S)
            for engine in self.engines:
                if engine.process is None:  # ranks of the run: their launcher detects when they hang
                    continue
                limit = 2 * self._stall_s if engine.is_ready else self._build_timeout_s
                if limit and engine.stalled_s > limit and (engine.requests or not engine.is_ready):
                    print(f"engine {engine.number} has made no progress for {engine.stalled_s:.0f} s", flush=True)
                    engine.kill()
            self._expire()

    def _expire(self) -> None:
        """End requests past their deadline: waiting ones, and those whose engine is silent."""
        now = time.monotonic()
        for state in list(self._waiting):
            request, waited = state.request, now - state.times.arrived
            in_queue_s = request.queue_deadline_s if state.times.started is None else None
            if waited > min(in_queue_s or waited, request.deadline_s or waited):
                state.fail(DeadlineExceeded(while_queued=state.times.started is None))
        for engine in self.engines:
            for state in list(engine.requests.values()):
                limit = state.request.deadline_s
                if limit is not None and now - state.times.arrived > limit + _DEADLINE_MARGIN_S:
                    state.fail(DeadlineExceeded(while_queued=state.times.started is None))


def _sum_totals(one: EngineStats, other: EngineStats) -> EngineStats:
    """Return the sum of all totals."""
    names = [field.name for field in fields(EngineStats) if field.name.endswith("_total")]
    return EngineStats(**{name: getattr(one, name) + getattr(other, name) for name in names})
