"""The server process: listen, get ready, serve, drain; and the job ``serve`` that runs it.

One rank runs the server and starts engine processes. Where several ranks hold one model, the first one's engine
serves, and a child process of it runs the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from launcher.config.inference import API_KEYS_VARIABLE
from launcher.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_UNFIT, JobError
from launcher.inference.engine.loop import ConnectionLost, EngineConnection, run_engine_loop
from launcher.inference.server.backends import ModelBackend, ReplicaBackend, VllmBackend
from launcher.inference.server.http_limits import AllowedHosts, limited_protocol
from launcher.inference.server.middleware import AdmissionMiddleware, RateLimiter, read_api_keys
from launcher.inference.server.replica_pool import ReplicaClient, ReplicaPool, start_replica
from launcher.protocol.metrics import MetricsWriter
from launcher.protocol.rundir import RunDir
from launcher.utils.system import raise_open_file_limit

if TYPE_CHECKING:
    from launcher.config.job.serve import Serve
    from launcher.config.run import Run
    from launcher.engines.context import Context


_BACKLOG = 2048
_KEEP_ALIVE_S = 15
_READ_TIMEOUT_S = 60.0
"""A client that takes nothing for so long is gone; so is one whose machine does not answer."""
_ALIVE_S = 30
"""After so much silence the system asks whether the client's machine is there."""
_LAST_S = 3
"""Time that answers get to leave once there is nothing to wait for."""

_WATCHED = {
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): int(_READ_TIMEOUT_S * 1000),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): _ALIVE_S,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): _ALIVE_S // 3,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
}
"""How a client is noticed that vanished without a word, as one does whose machine or network is gone."""


class UvicornServer(uvicorn.Server):
    """Ends when it is told to by ``should_exit``, never by a signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def make_server(
    app: Any, *, max_connections: int, headers_s: float, reading_s: float = _READ_TIMEOUT_S
) -> UvicornServer:
    """Return a server for an ASGI application; what its arguments limit, ``protocol`` says."""
    config = uvicorn.Config(
        app,
        http=limited_protocol(max_connections, headers_s=headers_s, reading_s=reading_s),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_S,
        server_header=False,
        proxy_headers=False,
    )
    return UvicornServer(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        OSError: nobody can.
    """
    family, kind, protocol_number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol_number)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for option, value in _WATCHED.items():  # connections inherit them
            listener.setsockopt(*option, value)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


_HEARTBEAT_S = 1.0
_DISCONNECT_TURNS = 10
"""Turns of the event loop in which clients that are gone when the signal comes are noticed."""
_FLUSH_S = 2.0
"""For answers that say the server is ending to get out."""
Heartbeat = Callable[[str], None]


class ApiServer:
    """One server.

    Args:
        run: what is served.
        job: how.
        run_dir: where its metrics go.
        make_backing: makes what answers; called in the event loop.
        heartbeat: called every second.
    """

    def __init__(
        self, run: Run, job: Serve, *, run_dir: RunDir, make_backing: Callable[[], ModelBackend], heartbeat: Heartbeat
    ) -> None:
        self._run, self._job, self._run_dir, self._make_backing, self._heartbeat = (
            run,
            job,
            run_dir,
            make_backing,
            heartbeat,
        )
        self._asked: asyncio.Event = asyncio.Event()
        self._signal: int | None = None

    async def serve(self) -> int:
        """Serve until told to end; return the exit code.

        Raises:
            ConfigError: the address cannot be listened on, or the engine cannot be built as asked.
            JobError: the engine cannot be built.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            asyncio.get_running_loop().add_signal_handler(number, self._note, number)
        listener = self._listen()
        backing = self._make_backing()
        job = self._job
        server = make_server(self._gated(backing), max_connections=job.max_connections, headers_s=job.read_timeout_s)
        http = asyncio.create_task(server.serve(sockets=[listener]))
        heart, ready = asyncio.create_task(self._heart(backing)), asyncio.create_task(self._get_ready(backing))
        try:
            backing.open()
            await self._until_asked(backing, http=http, others={heart, ready})
            await self._drain(backing, server, http)
        finally:
            for task in (http, heart, ready):
                task.cancel()
            await asyncio.gather(http, heart, ready, return_exceptions=True)
            await backing.close()
        return EXIT_PREEMPTED if self._signal == signal.SIGUSR1 else 0

    def _listen(self) -> socket.socket:
        try:
            return listen(self._job.host, self._job.port)
        except OSError as error:
            said = (
                (error.strerror or str(error)).lower().replace("address already in use", "somebody else does already")
            )
            raise self._job.error("port", f"cannot be listened on: {said}", "set job.port to a free one") from error

    def _gated(self, backing: ModelBackend) -> AdmissionMiddleware:
        job = self._job
        return AdmissionMiddleware(
            backing.app,
            keys=read_api_keys(job.api_keys_file, os.environ),
            hosts=AllowedHosts(job.host, job.allowed_hosts),
            rates=RateLimiter(job.rate_per_minute),
            max_body_bytes=job.max_body_bytes,
            body_s=job.read_timeout_s,
            reject=backing.reject,
        )

    def _note(self, number: int) -> None:
        if self._signal is None:
            self._signal = number
            self._asked.set()

    async def _until_asked(
        self, backing: ModelBackend, *, http: asyncio.Task[None], others: set[asyncio.Task[None]]
    ) -> None:
        """Wait for a signal; raise what makes it impossible to go on."""
        asked = asyncio.create_task(self._asked.wait())
        waits: set[asyncio.Future[None] | asyncio.Task[bool]] = {asked, backing.broken, http, *others}
        while not asked.done():
            done, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
            assert http not in done, "the HTTP server ends when it is told to"

    async def _get_ready(self, backing: ModelBackend) -> None:
        started = time.monotonic()
        await backing.get_ready()
        took_s = time.monotonic() - started
        gc.collect()
        gc.freeze()  # else each full collection looks at all modules again, for a tenth of a second
        job = self._job
        print(
            f"serving {job.name_of(self._run)} at {job.address} after {took_s:.1f} s; {job.address}/ shows how it does",
            flush=True,
        )

    async def _drain(self, backing: ModelBackend, server: UvicornServer, http: asyncio.Task[None]) -> None:
        """Take nothing more, finish what was accepted, tell the rest, close."""
        backing.drain()
        for _ in range(_DISCONNECT_TURNS):
            await asyncio.sleep(0.01)
        print(f"draining: {backing.open_requests} requests are open", flush=True)
        await _wait_until_idle(backing, within_s=self._job.drain_s)
        if left := backing.open_requests:
            backing.fail_all()
            print(f"{left} requests were told that there was no time left", flush=True)
            await _wait_until_idle(backing, within_s=_FLUSH_S)
        server.should_exit = True
        await http

    async def _heart(self, backing: ModelBackend) -> None:
        """Beat, and write a line of metrics every few seconds and at the end."""
        every_s = self._job.metrics_every_s
        with MetricsWriter(self._run_dir.metrics) as writer:
            next_line = time.monotonic() + every_s
            try:
                while True:
                    self._heartbeat("serve")
                    await asyncio.sleep(min(_HEARTBEAT_S, every_s))
                    if time.monotonic() >= next_line:
                        next_line = time.monotonic() + every_s
                        _record(writer, backing)
            finally:
                _record(writer, backing)


def _record(writer: MetricsWriter, backing: ModelBackend) -> None:
    try:
        writer.record(backing.num_ended, **dict(backing.row()))
    except OSError as error:  # a full disk is no reason to stop answering
        print(f"a line of metrics is lost: {error}", flush=True)


async def _wait_until_idle(backing: ModelBackend, *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while backing.open_requests and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


_RESERVED_FILES = 256


def serve(job: Serve, context: Context) -> None:
    """Serve until told to end."""
    if context.world_size > 1:
        serve_across_ranks(job, context)
        return
    environ = _engine_environ(job)

    def start(number: int, pool: ReplicaPool) -> ReplicaClient:
        process, connection = start_replica(context.run_dir.path, number, environ=environ)
        return ReplicaClient(number, connection, process=process, on_ready=pool.on_ready, on_lost=pool.on_lost)

    def backing() -> ModelBackend:
        return VllmBackend(context.run, job) if job.engine == "vllm" else ReplicaBackend(context.run, job, start=start)

    async def front() -> int:
        heartbeat = context.heartbeat.update
        return await ApiServer(
            context.run, job, run_dir=context.run_dir, make_backing=backing, heartbeat=heartbeat
        ).serve()

    with raise_open_file_limit(job.max_connections + _RESERVED_FILES):
        code = asyncio.run(front())
    if code:
        sys.exit(code)


def _engine_environ(job: Serve) -> dict[str, str]:
    """Return what engines inherit: their share of the cores, and no keys."""
    environ = {name: value for name, value in os.environ.items() if name != API_KEYS_VARIABLE}
    threads = int(environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    return {**environ, "OMP_NUM_THREADS": str(max(1, threads // job.replicas))}


_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def serve_across_ranks(job: Serve, context: Context) -> None:
    """Serve until told to end, on every rank."""
    front = _ServerProcess(context) if context.is_main else None
    for number in _FORWARDED_SIGNALS:
        signal.signal(number, signal.SIG_IGN if front is None else front.pass_on)  # what ends the others is the first
    from launcher.engines.distributed import disconnect
    from launcher.inference.engine.paged_engine import make_engine_across_ranks

    def heartbeat(phase: str = "build") -> None:
        context.heartbeat.update(phase)

    generator = make_engine_across_ranks(context, limits=job.limits, heartbeat=heartbeat)
    if front is None or generator is None:
        return
    generator.warm_up(job.warm_up)
    generator.profiler = context.profiler
    with contextlib.suppress(ConnectionLost):  # its exit code says why
        run_engine_loop(generator, front.link, heartbeat=heartbeat)
    generator.close()
    disconnect()
    front.finish()


class _ServerProcess:
    """The process that speaks HTTP, as the first rank sees it."""

    def __init__(self, context: Context) -> None:
        ours, theirs = socket.socketpair()
        words = (str(context.run_dir.path), str(theirs.fileno()), str(os.getpid()))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launcher.inference.server", *words],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.link = EngineConnection(ours)

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Tell it what this rank was told."""
        if self._process.poll() is None:  # not waited for yet, so the number is still its own
            self._process.send_signal(number)

    def finish(self) -> None:
        """Let it end, and end as it did.

        Raises:
            SystemExit: it asks to be started again.
            JobError: it failed, with its exit code where that says what is bad (65, 69).
        """
        self.link.close()
        code = self._process.wait()
        if code == EXIT_PREEMPTED:
            sys.exit(code)
        if code in (EXIT_BAD_INPUT, EXIT_UNFIT):
            raise JobError("the server could not start: see its error above", exit_code=code)
        if code:
            raise JobError(f"the process that speaks HTTP ended with exit code {code}; its words are above")
