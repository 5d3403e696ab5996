"""Backends that compute answers: replicas of the launcher's engines, or vLLM's server."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from launcher.errors import ConfigError, JobError
from launcher.inference.engine.vllm_engine import VllmServer
from launcher.inference.server.app import make_app
from launcher.inference.server.engine_client import EngineClient, ServerLimits
from launcher.inference.server.image_fetcher import ImageFetcher
from launcher.inference.server.image_pool import ImagePool
from launcher.inference.server.proxy import Proxy, ProxyLimits
from launcher.inference.server.replica_pool import ReplicaPool, StartReplica
from launcher.inference.server.result_cache import ResultCache, model_fingerprint
from launcher.inference.tokenizer import open_tokenizer
from launcher.models.pretrained import tokenizer_folder, transformers_folder
from launcher.models.processor import processor_fingerprint

if TYPE_CHECKING:
    from launcher.config.job.serve import Serve
    from launcher.config.run import Run


class ModelBackend(ABC):
    """The launcher's own engines, or another server behind this one."""

    app: ASGIApp
    """Application that answers requests."""
    broken: asyncio.Future[None]
    """Gets the exception that ends the server."""

    @abstractmethod
    def open(self) -> None:
        """Start the engines; return at once."""

    @abstractmethod
    async def wait_until_ready(self) -> None:
        """Return once requests can be answered.

        Raises:
            LauncherError: they never will be.
        """

    @property
    @abstractmethod
    def open_requests(self) -> int:
        """Requests without a complete response."""

    @abstractmethod
    def drain(self) -> None:
        """Reject new requests."""

    @abstractmethod
    def fail_all(self) -> None:
        """Fail the requests that are left."""

    @abstractmethod
    def reject(self, reason: str) -> None:
        """Count a request that the middleware rejected."""

    @abstractmethod
    async def close(self) -> None:
        """End everything that it started."""

    @property
    @abstractmethod
    def num_ended(self) -> int:
        """Number of ended sequences or requests: the step of a line of metrics.jsonl."""

    @abstractmethod
    def metrics_row(self) -> Iterator[tuple[str, float]]:
        """Yield the values of a line of metrics.jsonl."""


class ReplicaBackend(ModelBackend):
    """Replicas of an engine.

    Args:
        run: what is served.
        job: how.
        start: starts an engine.
    """

    def __init__(self, run: Run, job: Serve, *, start: StartReplica) -> None:
        self._run, self._job = run, job
        stall_s, build_timeout_s = job.stall_s, run.backend.stall_timeout_s
        self._pool = ReplicaPool(job.replicas, start, stall_s=stall_s, build_timeout_s=build_timeout_s)
        limits = ServerLimits(
            name=job.name_of(run),
            adapters=job.adapters,
            capacity=job.capacity,
            max_queue=job.max_queue,
            max_choices=job.max_choices,
            max_images=job.max_images,
            queue_timeout_s=job.queue_timeout_s,
            request_timeout_s=job.request_timeout_s,
        )
        results = ResultCache(job.result_cache_bytes, ttl_s=job.result_cache_ttl_s)
        self._client = EngineClient(limits, pool=self._pool, results=results)
        self.app = make_app(self._client)
        self.broken = self._pool.broken

    def open(self) -> None:
        """Start the engines."""
        self._pool.open()

    async def wait_until_ready(self) -> None:
        """Load the tokenizer while the engines are built."""
        job, run, client = self._job, self._run, self._client
        tokenizer = await asyncio.to_thread(
            open_tokenizer, job.tokenizer, run, heartbeat=lambda: None, template=job.chat_template
        )
        shape = run.model.shape()
        if shape is not None and tokenizer.vocab_size > shape.vocab_size:
            why = f"it has {tokenizer.vocab_size} tokens, and {run.model.name} has {shape.vocab_size} embedding rows"
            raise ConfigError(
                "job.tokenizer", job.tokenizer, why=why, fix="choose the model's tokenizer, or a smaller one"
            )
        processor = await self._open_images() if tokenizer.image_token and job.engine == "paged" else ""
        client.fingerprint_hash = await asyncio.to_thread(
            model_fingerprint, run, tokenizer=tokenizer.fingerprint, processor=processor, heartbeat=lambda: None
        )
        client.tokenizer = tokenizer
        while self._pool.max_model_len is None:
            await asyncio.sleep(0.05)

    async def _open_images(self) -> str:
        """Start to preprocess images; return the fingerprint of the processor.

        Raises:
            JobError: it cannot be loaded.
        """
        job, run = self._job, self._run
        folder = Path(job.tokenizer).expanduser()
        if job.tokenizer == "model":
            folder = await asyncio.to_thread(
                tokenizer_folder, run.model, heartbeat=lambda: None, option="job.tokenizer"
            )
        sizes = {"num_workers": job.image_workers, "cache_bytes": job.image_cache_bytes}
        fetcher = ImageFetcher(job.image_hosts, max_bytes=job.max_image_bytes) if job.image_hosts else None
        self._client.images = ImagePool(folder, limits=job.image_limits, fetcher=fetcher, **sizes)
        self._client.images.open()
        await self._client.images.ready
        return await asyncio.to_thread(processor_fingerprint, folder)

    @property
    def open_requests(self) -> int:
        """Requests without a complete response."""
        return self._client.open_requests

    def drain(self) -> None:
        """Reject new requests."""
        self._client.draining = True

    def fail_all(self) -> None:
        """Fail the requests that are left."""
        self._pool.fail_all()

    def reject(self, reason: str) -> None:
        """Count a request that the middleware rejected."""
        self._client.reject(reason)

    async def close(self) -> None:
        """End the engines."""
        await self._pool.close()
        if self._client.images is not None:
            await self._client.images.close()

    @property
    def num_ended(self) -> int:
        """Sequences that have ended."""
        return self._client.metrics.num_ended

    def metrics_row(self) -> Iterator[tuple[str, float]]:
        """Yield the values of a line of metrics.jsonl."""
        yield from self._client.metrics.row().items()


_HEALTH_CHECK_S = 0.5
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0
_HEALTHY_S = 60.0
"""A server that ran for so long resets the pause."""


class VllmBackend(ModelBackend):
    """One vLLM server on a loopback port, restarted when it dies.

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
        self._proxy = Proxy("127.0.0.1", self._server.port, limits=limits, authorization=self._server.authorization)
        self.app = self._proxy
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watch: asyncio.Task[None] | None = None
        self._model = ""
        self._was_healthy = False
        self._restarts = 0

    def open(self) -> None:
        """Start to monitor; the process is started once the weights are there."""
        self._watch = asyncio.create_task(self._monitor())

    async def wait_until_ready(self) -> None:
        """Return once it is healthy for the first time."""
        compute = self._run.precision.compute
        folder = await asyncio.to_thread(transformers_folder, self._run.model, dtype=compute, heartbeat=lambda: None)
        assert folder is not None, "random weights are refused before anything starts"
        self._model = str(folder)
        self._server.start(self._model)
        while not self._proxy.is_ready:
            await asyncio.sleep(0.05)

    @property
    def open_requests(self) -> int:
        """Requests without a complete response."""
        return self._proxy.open_requests

    def drain(self) -> None:
        """Reject new requests."""
        self._proxy.draining = True

    def fail_all(self) -> None:
        """Cancel the requests that are left."""
        self._proxy.cancel_all()

    def reject(self, reason: str) -> None:
        """Count a request that the middleware rejected."""
        self._proxy.rejected += 1

    async def close(self) -> None:
        """End the process and its children."""
        if self._watch is not None:
            self._watch.cancel()
        await self._proxy.close()
        await asyncio.to_thread(self._server.end)

    @property
    def num_ended(self) -> int:
        """Requests that were forwarded."""
        return self._proxy.num_ended

    def metrics_row(self) -> Iterator[tuple[str, float]]:
        """Yield the proxy's own counts; vLLM's metrics are at /metrics."""
        yield "serve/requests", float(self._proxy.num_ended)
        yield "serve/requests_rejected", float(self._proxy.rejected)
        yield "serve/engine_restarts", float(self._restarts)

    async def _monitor(self) -> None:
        """Probe its health; restart it when it has ended."""
        pause_s = _MIN_BACKOFF_S
        while True:
            await asyncio.sleep(_HEALTH_CHECK_S)
            if not self._server.is_started:
                continue
            code = self._server.exit_code()
            if code is None:
                self._proxy.is_ready = await self._proxy.probe()
                self._was_healthy |= self._proxy.is_ready
                continue
            self._proxy.is_ready = False
            if not self._was_healthy:
                self.broken.set_exception(JobError(f"vLLM ended with exit code {code}; see its error above"))
                return
            if self._server.age_s > _HEALTHY_S:
                pause_s = _MIN_BACKOFF_S
            print(f"vLLM ended with exit code {code}; it is restarted in {pause_s:.0f} s", flush=True)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_BACKOFF_S)
            self._restarts += 1
            self._server.start(self._model)
