"""The front from its first breath to its last: listen, get ready, serve, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.errors import EXIT_PREEMPTED, ConfigError
from launcher.rundir import RunDir
from launcher.serving.api.app import make_app
from launcher.serving.api.gate import Gate
from launcher.serving.api.keys import Rates, read_keys
from launcher.serving.api.server import Server, listen, make_server
from launcher.serving.api.service import Policy, Service
from launcher.serving.front.identity import identity_of
from launcher.serving.front.pool import Pool, Start
from launcher.serving.front.results import Results
from launcher.serving.words import open_words
from launcher.training.metrics import MetricsWriter

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.jobs.serve import Serve

_BEAT_S = 1.0
_LAST_WORDS_S = 2.0
"""For answers that say the server is ending to get out."""

Beat = Callable[[str], None]


class Front:
    """One server.

    Args:
        run: what is served.
        job: how.
        run_dir: where its metrics go.
        start: starts an engine.
        beat: called every second.
    """

    def __init__(self, run: Run, job: Serve, *, run_dir: RunDir, start: Start, beat: Beat) -> None:
        self._run, self._job, self._run_dir, self._start, self._beat = run, job, run_dir, start, beat
        self._asked: asyncio.Event = asyncio.Event()
        self._signal: int | None = None

    async def serve(self) -> int:
        """Serve until told to end; return the exit code.

        Raises:
            ConfigError: the address cannot be listened on, or the engine cannot be built as asked.
            JobError: the engine cannot be built.
        """
        job = self._job
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            asyncio.get_running_loop().add_signal_handler(number, self._note, number)
        listener = self._listen()
        pool = Pool(job.replicas, self._start, stall_s=job.stall_s, building_s=self._run.backend.stall_timeout_s)
        service = Service(_policy(job, self._run), pool=pool, results=_results(job))
        server = make_server(_gated(service, job), max_connections=job.max_connections)
        tasks = [
            asyncio.create_task(server.serve(sockets=[listener]), name="http"),
            asyncio.create_task(self._heart(service), name="heart"),
            asyncio.create_task(self._get_ready(service), name="ready"),
        ]
        pool.open()
        try:
            await self._until_asked(pool, tasks)
            await self._drain(service, server, tasks[0])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await pool.close()
        return EXIT_PREEMPTED if self._signal == signal.SIGUSR1 else 0

    def _listen(self) -> socket.socket:
        try:
            return listen(self._job.host, self._job.port)
        except OSError as error:
            why = f"cannot be listened on: {(error.strerror or str(error)).lower().replace('address ', '')}"
            raise self._job.refuse("port", why, "set job.port to a free one") from error

    def _note(self, number: int) -> None:
        if self._signal is None:
            self._signal = number
            self._asked.set()

    async def _until_asked(self, pool: Pool, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for a signal; raise what makes it impossible to go on."""
        asked = asyncio.ensure_future(self._asked.wait())
        waits: set[asyncio.Future[object]] = {asked, pool.broken, *tasks}  # type: ignore[arg-type]
        while not asked.done():
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in done - {asked}:
                each.result()
                waits.discard(each)
                if isinstance(each, asyncio.Task) and each.get_name() == "http":
                    raise AssertionError("the HTTP server ended by itself")

    async def _get_ready(self, service: Service) -> None:
        """Load the tokenizer while engines are built; say when everything is there."""
        job, started = self._job, time.monotonic()
        words = await asyncio.to_thread(open_words, job.tokenizer, self._run, beat=lambda: None)
        service.identity = await asyncio.to_thread(
            identity_of, self._run, tokenizer=words.fingerprint, beat=lambda: None
        )
        service.words = words
        while service.pool.context is None:
            await asyncio.sleep(0.05)
        if (shape := self._run.model.shape()) is not None and words.vocab_size > shape.vocab_size:
            why = (
                f"it has {words.vocab_size} tokens, and {self._run.model.name} has {shape.vocab_size} rows of embedding"
            )
            raise ConfigError("job.tokenizer", job.tokenizer, why=why, fix="choose the model's own, or a smaller one")
        print(
            f"serving {service.policy.name} at {job.address} after {time.monotonic() - started:.1f} s "
            f"(v1/completions, v1/chat/completions; this page shows how it does: {job.address}/)",
            flush=True,
        )

    async def _drain(self, service: Service, server: Server, http: asyncio.Task[None]) -> None:
        """Take nothing more, finish what was accepted, tell the rest, close."""
        deadline = time.monotonic() + self._job.drain_s
        service.draining = True
        print(f"draining: {service.open_requests} requests are open", flush=True)
        while service.open_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if left := service.open_requests:
            service.pool.fail_all()
            print(f"{left} requests were told that there was no time left", flush=True)
            until = time.monotonic() + _LAST_WORDS_S
            while service.open_requests and time.monotonic() < until:
                await asyncio.sleep(0.02)
        server.should_exit = True
        await http

    async def _heart(self, service: Service) -> None:
        """Beat, and write a line of metrics every few seconds."""
        with MetricsWriter(self._run_dir.metrics) as writer:
            next_line = time.monotonic() + self._job.metrics_every_s
            try:
                while True:
                    self._beat("serve")
                    await asyncio.sleep(min(_BEAT_S, self._job.metrics_every_s))
                    if time.monotonic() >= next_line:
                        next_line = time.monotonic() + self._job.metrics_every_s
                        writer.record(service.numbers.num_ended, **service.numbers.row())
            finally:
                writer.record(service.numbers.num_ended, **service.numbers.row())


def _gated(service: Service, job: Serve) -> Gate:
    return Gate(
        make_app(service),
        keys=read_keys(job.api_keys_file, os.environ),
        rates=Rates(job.rate_per_minute),
        max_body_bytes=job.max_body_bytes,
        reject=service.reject,
    )


def _policy(job: Serve, run: Run) -> Policy:
    return Policy(
        name=job.served_name or run.model.name,
        capacity=job.capacity,
        max_queue=job.max_queue,
        max_choices=job.max_choices,
        queue_timeout_s=job.queue_timeout_s,
        request_timeout_s=job.request_timeout_s,
    )


def _results(job: Serve) -> Results:
    return Results(job.result_cache_bytes, ttl_s=job.result_cache_ttl_s)
