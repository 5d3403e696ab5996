"""Our own engines as what a front serves: the pool of replicas, and the interface over them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.errors import ConfigError
from launcher.serving.api.app import make_app
from launcher.serving.api.service import Policy, Service
from launcher.serving.front.backing import Backing
from launcher.serving.front.identity import identity_of
from launcher.serving.front.pool import Pool, Start
from launcher.serving.front.results import Results
from launcher.serving.words import open_words

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.jobs.serve import Serve


class Ours(Backing):
    """Replicas of an engine.

    Args:
        run: what is served.
        job: how.
        start: starts an engine.
    """

    def __init__(self, run: Run, job: Serve, *, start: Start) -> None:
        self._run, self._job = run, job
        stall_s, building_s = job.stall_s, run.backend.stall_timeout_s
        self._pool = Pool(job.replicas, start, stall_s=stall_s, building_s=building_s)
        policy = Policy(
            name=job.name_of(run),
            capacity=job.capacity,
            max_queue=job.max_queue,
            max_choices=job.max_choices,
            queue_timeout_s=job.queue_timeout_s,
            request_timeout_s=job.request_timeout_s,
        )
        results = Results(job.result_cache_bytes, ttl_s=job.result_cache_ttl_s)
        self._service = Service(policy, pool=self._pool, results=results)
        self.app = make_app(self._service)
        self.broken = self._pool.broken

    def open(self) -> None:
        """Start the engines."""
        self._pool.open()

    async def get_ready(self) -> None:
        """Load the tokenizer while the engines are built."""
        job, run, service = self._job, self._run, self._service
        words = await asyncio.to_thread(open_words, job.tokenizer, run, beat=lambda: None, template=job.chat_template)
        shape = run.model.shape()
        if shape is not None and words.vocab_size > shape.vocab_size:
            why = f"it has {words.vocab_size} tokens, and {run.model.name} has {shape.vocab_size} rows of embedding"
            raise ConfigError("job.tokenizer", job.tokenizer, why=why, fix="choose the model's own, or a smaller one")
        service.identity = await asyncio.to_thread(identity_of, run, tokenizer=words.fingerprint, beat=lambda: None)
        service.words = words
        while self._pool.context is None:
            await asyncio.sleep(0.05)

    @property
    def open_requests(self) -> int:
        """Requests that are not answered to their end."""
        return self._service.open_requests

    def drain(self) -> None:
        """Take no more."""
        self._service.draining = True

    def fail_all(self) -> None:
        """Tell whoever still waits that there is no time left."""
        self._pool.fail_all()

    def reject(self, reason: str) -> None:
        """Count a request that was turned away at the gate."""
        self._service.reject(reason)

    async def close(self) -> None:
        """End the engines."""
        await self._pool.close()

    @property
    def num_ended(self) -> int:
        """Sequences that have ended."""
        return self._service.numbers.num_ended

    def row(self) -> Iterator[tuple[str, float]]:
        """Yield what a line of metrics.jsonl holds."""
        yield from self._service.numbers.row().items()
