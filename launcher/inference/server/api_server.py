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
from launcher.inference.server.http_limits import AllowedHosts, TrustedProxies, limited_protocol
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
"""Socket options that detect a client whose machine or network is gone."""


class UvicornServer(uvicorn.Server):
    """Ends when ``should_exit`` is set, never by a signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def make_server(
    app: Any, *, max_connections: int, headers_timeout_s: float, write_timeout_s: float = _READ_TIMEOUT_S
) -> UvicornServer:
    """Return a server for an ASGI application; what its arguments limit, ``protocol`` says."""
    config = uvicorn.Config(
        app,
        http=limited_protocol(max_connections, headers_timeout_s=headers_timeout_s, write_timeout_s=write_timeout_s),
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
        OSError: the address cannot be bound.
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
        make_backend: makes the backend; called in the event loop.
        heartbeat: called every second.
    """

    def __init__(
        self, run: Run, job: Serve, *, run_dir: RunDir, make_backend: Callable[[], ModelBackend], heartbeat: Heartbeat
    ) -> None:
        self._run, self._job, self._run_dir, self._make_backend, self._heartbeat = (
            run,
            job,
            run_dir,
            make_backend,
            heartbeat,
        )
        self._signalled: asyncio.Event = asyncio.Event()
        self._signal: int | None = None

    async def serve(self) -> int:
        """Serve until a signal; return the exit code.

        Raises:
            ConfigError: the address cannot be listened on, or the engine cannot be built as configured.
            JobError: the engine cannot be built.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            asyncio.get_running_loop().add_signal_handler(number, self._handle_signal, number)
        listener = self._listen()
        backend = self._make_backend()
        job = self._job
        server = make_server(
            self._with_admission(backend), max_connections=job.max_connections, headers_timeout_s=job.read_timeout_s
        )
        http = asyncio.create_task(server.serve(sockets=[listener]))
        recorder, ready = (
            asyncio.create_task(self._record_metrics(backend)),
            asyncio.create_task(self._wait_until_ready(backend)),
        )
        try:
            backend.open()
            await self._wait_for_signal(backend, http=http, others={recorder, ready})
            await self._drain(backend, server, http)
        finally:
            for task in (http, recorder, ready):
                task.cancel()
            await asyncio.gather(http, recorder, ready, return_exceptions=True)
            await backend.close()
        return EXIT_PREEMPTED if self._signal == signal.SIGUSR1 else 0

    def _listen(self) -> socket.socket:
        try:
            return listen(self._job.host, self._job.port)
        except OSError as error:
            why = (error.strerror or str(error)).lower().replace("address already in use", "port already in use")
            raise self._job.error("port", why, "set job.port to another port") from error

    def _with_admission(self, backend: ModelBackend) -> AdmissionMiddleware:
        job = self._job
        return AdmissionMiddleware(
            backend.app,
            keys=read_api_keys(job.api_keys_file, os.environ),
            hosts=AllowedHosts(job.host, job.allowed_hosts),
            proxies=TrustedProxies(job.trusted_proxies),
            rates=RateLimiter(job.rate_per_minute),
            max_body_bytes=job.body_limit(self._run),
            body_timeout_s=job.read_timeout_s,
            reject=backend.reject,
        )

    def _handle_signal(self, number: int) -> None:
        if self._signal is None:
            self._signal = number
            self._signalled.set()

    async def _wait_for_signal(
        self, backend: ModelBackend, *, http: asyncio.Task[None], others: set[asyncio.Task[None]]
    ) -> None:
        """Wait for a signal; raise an error that ends the server."""
        signalled = asyncio.create_task(self._signalled.wait())
        waits: set[asyncio.Future[None] | asyncio.Task[bool]] = {signalled, backend.broken, http, *others}
        while not signalled.done():
            done, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
            assert http not in done, "the HTTP server ends when should_exit is set"

    async def _wait_until_ready(self, backend: ModelBackend) -> None:
        started = time.monotonic()
        await backend.wait_until_ready()
        took_s = time.monotonic() - started
        gc.collect()
        gc.freeze()  # else each full collection looks at all modules again, for a tenth of a second
        job = self._job
        print(
            f"serving {job.name_of(self._run)} at {job.address} after {took_s:.1f} s; {job.address}/ shows its status",
            flush=True,
        )

    async def _drain(self, backend: ModelBackend, server: UvicornServer, http: asyncio.Task[None]) -> None:
        """Reject new requests, finish accepted ones, fail the rest, close."""
        backend.drain()
        for _ in range(_DISCONNECT_TURNS):
            await asyncio.sleep(0.01)
        print(f"draining: {backend.open_requests} requests are open", flush=True)
        await _wait_until_idle(backend, timeout_s=self._job.drain_s)
        if left := backend.open_requests:
            backend.fail_all()
            print(f"{left} requests failed: the drain time had passed", flush=True)
            await _wait_until_idle(backend, timeout_s=_FLUSH_S)
        server.should_exit = True
        await http

    async def _record_metrics(self, backend: ModelBackend) -> None:
        """Update the heartbeat, and write a line of metrics every few seconds and at the end."""
        every_s = self._job.metrics_every_s
        with MetricsWriter(self._run_dir.metrics) as writer:
            next_line = time.monotonic() + every_s
            try:
                while True:
                    self._heartbeat("serve")
                    await asyncio.sleep(min(_HEARTBEAT_S, every_s))
                    if time.monotonic() >= next_line:
                        next_line = time.monotonic() + every_s
                        _record(writer, backend)
            finally:
                _record(writer, backend)


def _record(writer: MetricsWriter, backend: ModelBackend) -> None:
    try:
        writer.record(backend.num_ended, **dict(backend.metrics_row()))
    except OSError as error:  # a full disk is no reason to stop answering
        print(f"a line of metrics is lost: {error}", flush=True)


async def _wait_until_idle(backend: ModelBackend, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while backend.open_requests and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


_RESERVED_FILES = 256


def serve(job: Serve, context: Context) -> None:
    """Serve until a signal."""
    if context.world_size > 1:
        serve_across_ranks(job, context)
        return
    environ = _engine_environ(job)

    def start(number: int, pool: ReplicaPool) -> ReplicaClient:
        process, connection = start_replica(context.run_dir.path, number, environ=environ)
        return ReplicaClient(number, connection, process=process, on_ready=pool.on_ready, on_lost=pool.on_lost)

    def backend() -> ModelBackend:
        return VllmBackend(context.run, job) if job.engine == "vllm" else ReplicaBackend(context.run, job, start=start)

    async def run_server() -> int:
        heartbeat = context.heartbeat.update
        return await ApiServer(
            context.run, job, run_dir=context.run_dir, make_backend=backend, heartbeat=heartbeat
        ).serve()

    with raise_open_file_limit(job.max_connections + _RESERVED_FILES):
        code = asyncio.run(run_server())
    if code:
        sys.exit(code)


def _engine_environ(job: Serve) -> dict[str, str]:
    """Return the environment of engines: their share of the cores, and no API keys."""
    environ = {name: value for name, value in os.environ.items() if name != API_KEYS_VARIABLE}
    threads = int(environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    return {**environ, "OMP_NUM_THREADS": str(max(1, threads // job.replicas))}


_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def serve_across_ranks(job: Serve, context: Context) -> None:
    """Serve until a signal, on every rank."""
    server = _ServerProcess(context) if context.is_main else None
    for number in _FORWARDED_SIGNALS:
        # the first rank ends the others
        signal.signal(number, signal.SIG_IGN if server is None else server.forward_signal)
    from launcher.engines.distributed import disconnect
    from launcher.inference.engine.paged_engine import make_engine_across_ranks

    def heartbeat(phase: str = "build") -> None:
        context.heartbeat.update(phase)

    engine = make_engine_across_ranks(context, limits=job.limits, heartbeat=heartbeat)
    if server is None or engine is None:
        return
    engine.warm_up(job.warm_up)
    engine.profiler = context.profiler
    with contextlib.suppress(ConnectionLost):  # its exit code says why
        run_engine_loop(engine, server.connection, heartbeat=heartbeat)
    engine.close()
    disconnect()
    server.finish()


class _ServerProcess:
    """The process that speaks HTTP, as the first rank sees it."""

    def __init__(self, context: Context) -> None:
        local, remote = socket.socketpair()
        arguments = (str(context.run_dir.path), str(remote.fileno()), str(os.getpid()))
        with remote:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launcher.inference.server", *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[remote.fileno()],
            )
        self.connection = EngineConnection(local)

    def forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal of this rank to it."""
        if self._process.poll() is None:  # not waited for yet, so the number is still its own
            self._process.send_signal(number)

    def finish(self) -> None:
        """Wait for its end, and exit as it did.

        Raises:
            SystemExit: it was preempted.
            JobError: it failed, with its exit code where that says what is bad (65, 69).
        """
        self.connection.close()
        code = self._process.wait()
        if code == EXIT_PREEMPTED:
            sys.exit(code)
        if code in (EXIT_BAD_INPUT, EXIT_UNFIT):
            raise JobError("the server could not start: see its error above", exit_code=code)
        if code:
            raise JobError(f"the HTTP process ended with exit code {code}; see its error above")
