"""vLLM as what a front serves: its own server in an environment of its own, and every request handed on to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.errors import JobError
from launcher.serving.api.proxy import Proxy, ProxyLimits
from launcher.serving.front.backing import Backing
from launcher.serving.vllm_server import VllmServer

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.jobs.serve import Serve

_LOOK_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_WELL_S = 60.0
"""A server that lived so long was well: the next pause is the first again."""


class Vllm(Backing):
    """One vLLM server on a loopback port, started anew when it dies.

    Args:
        run: what is served.
        job: how.
    """

    def __init__(self, run: Run, job: Serve) -> None:
        self._run, self._server = run, VllmServer(run, job, name=job.name_of(run))
        limits = ProxyLimits(
            capacity=job.capacity,
            max_queue=job.max_queue,
            max_choices=job.max_choices,
            queue_timeout_s=job.queue_timeout_s,
            request_timeout_s=job.request_timeout_s,
        )
        self._proxy = Proxy("127.0.0.1", self._server.port, limits=limits)
        self.app = self._proxy
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watch: asyncio.Task[None] | None = None
        self._model = ""
        self._has_answered = False
        self._restarts = 0

    def open(self) -> None:
        """Begin to watch; the process is started once the weights are there."""
        self._watch = asyncio.create_task(self._look())

    async def get_ready(self) -> None:
        """Return once it answers for the first time."""
        folder = await asyncio.to_thread(self._run.model.weights_folder, beat=lambda: None)
        assert folder is not None, "random weights are refused before anything starts"
        self._model = str(folder)
        self._server.start(self._model)
        while not self._proxy.is_ready:
            await asyncio.sleep(0.05)

    @property
    def open_requests(self) -> int:
        """Requests that are not answered to their end."""
        return self._proxy.open_requests

    def drain(self) -> None:
        """Take no more."""
        self._proxy.draining = True

    def fail_all(self) -> None:
        """Break off what is left."""
        self._proxy.break_off()

    def reject(self, reason: str) -> None:
        """Count a request that was turned away at the gate."""
        self._proxy.rejected += 1

    async def close(self) -> None:
        """End the process and all that is below it."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.to_thread(self._server.end)

    @property
    def num_ended(self) -> int:
        """Requests that were handed on."""
        return self._proxy.num_ended

    def row(self) -> Iterator[tuple[str, float]]:
        """Yield what the proxy itself knows; vLLM's own numbers are at /metrics."""
        yield "serve/requests", float(self._proxy.num_ended)
        yield "serve/requests_rejected", float(self._proxy.rejected)
        yield "serve/engine_restarts", float(self._restarts)

    async def _look(self) -> None:
        """See whether it answers; start it anew when it has ended."""
        pause_s = _FIRST_PAUSE_S
        while True:
            await asyncio.sleep(_LOOK_S)
            if not self._server.is_started:
                continue
            code = self._server.exit_code()
            if code is None:
                self._proxy.is_ready = await self._proxy.answers()
                self._has_answered |= self._proxy.is_ready
                continue
            self._proxy.is_ready = False
            if not self._has_answered:
                self.broken.set_exception(JobError(f"vLLM ended with exit code {code}; its words are above"))
                return
            if self._server.age_s > _WELL_S:
                pause_s = _FIRST_PAUSE_S
            print(f"vLLM ended with exit code {code}; it is started anew in {pause_s:.0f} s", flush=True)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            self._restarts += 1
            self._server.start(self._model)
