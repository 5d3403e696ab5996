"""The front from its first breath to its last: listen, get ready, serve, drain."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.errors import EXIT_PREEMPTED
from launcher.rundir import RunDir
from launcher.serving.api.gate import Gate
from launcher.serving.api.http_checks import AllowedHosts
from launcher.serving.api.keys import Rates, read_keys
from launcher.serving.api.server import Server, listen, make_server
from launcher.serving.front.backing import Backing
from launcher.training.metrics import MetricsWriter

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.jobs.serve import Serve

_BEAT_S = 1.0
_LOOKS = 10
"""Turns of the event loop in which clients that are gone when the signal comes are noticed."""
_LAST_WORDS_S = 2.0
"""For answers that say the server is ending to get out."""

Beat = Callable[[str], None]


class Front:
    """One server.

    Args:
        run: what is served.
        job: how.
        run_dir: where its metrics go.
        make_backing: makes what answers; called in the event loop.
        beat: called every second.
    """

    def __init__(
        self, run: Run, job: Serve, *, run_dir: RunDir, make_backing: Callable[[], Backing], beat: Beat
    ) -> None:
        self._run, self._job, self._run_dir, self._make_backing, self._beat = run, job, run_dir, make_backing, beat
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
            raise self._job.refuse("port", f"cannot be listened on: {said}", "set job.port to a free one") from error

    def _gated(self, backing: Backing) -> Gate:
        job = self._job
        return Gate(
            backing.app,
            keys=read_keys(job.api_keys_file, os.environ),
            hosts=AllowedHosts(job.host, job.allowed_hosts),
            rates=Rates(job.rate_per_minute),
            max_body_bytes=job.max_body_bytes,
            body_s=job.read_timeout_s,
            reject=backing.reject,
        )

    def _note(self, number: int) -> None:
        if self._signal is None:
            self._signal = number
            self._asked.set()

    async def _until_asked(
        self, backing: Backing, *, http: asyncio.Task[None], others: set[asyncio.Task[None]]
    ) -> None:
        """Wait for a signal; raise what makes it impossible to go on."""
        asked = asyncio.create_task(self._asked.wait())
        waits: set[asyncio.Future[None] | asyncio.Task[bool]] = {asked, backing.broken, http, *others}
        while not asked.done():
            done, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
            assert http not in done, "the HTTP server ends when it is told to"

    async def _get_ready(self, backing: Backing) -> None:
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

    async def _drain(self, backing: Backing, server: Server, http: asyncio.Task[None]) -> None:
        """Take nothing more, finish what was accepted, tell the rest, close."""
        backing.drain()
        for _ in range(_LOOKS):
            await asyncio.sleep(0.01)
        print(f"draining: {backing.open_requests} requests are open", flush=True)
        await _until_none(backing, within_s=self._job.drain_s)
        if left := backing.open_requests:
            backing.fail_all()
            print(f"{left} requests were told that there was no time left", flush=True)
            await _until_none(backing, within_s=_LAST_WORDS_S)
        server.should_exit = True
        await http

    async def _heart(self, backing: Backing) -> None:
        """Beat, and write a line of metrics every few seconds and at the end."""
        every_s = self._job.metrics_every_s
        with MetricsWriter(self._run_dir.metrics) as writer:
            next_line = time.monotonic() + every_s
            try:
                while True:
                    self._beat("serve")
                    await asyncio.sleep(min(_BEAT_S, every_s))
                    if time.monotonic() >= next_line:
                        next_line = time.monotonic() + every_s
                        _record(writer, backing)
            finally:
                _record(writer, backing)


def _record(writer: MetricsWriter, backing: Backing) -> None:
    try:
        writer.record(backing.num_ended, **dict(backing.row()))
    except OSError as error:  # a full disk is no reason to stop answering
        print(f"a line of metrics is lost: {error}", flush=True)


async def _until_none(backing: Backing, *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while backing.open_requests and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
