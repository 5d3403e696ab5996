"""A whole server in the test's own process: its application and an engine on a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from launcher.inference.engine.base import InferenceEngine
from launcher.inference.engine.loop import EngineConnection, run_engine_loop
from launcher.inference.server.app import make_app
from launcher.inference.server.engine_client import EngineClient, ServerLimits
from launcher.inference.server.replica_pool import ReplicaClient, ReplicaPool
from launcher.inference.server.result_cache import ResultCache
from launcher.inference.tokenizer import TextTokenizer

MODEL = "tiny"


class InProcess:
    """Sends requests to the application, several at the same time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
        self._loop, self._client = loop, client

    def get(self, path: str) -> httpx.Response:
        """Return the answer to a request without a body."""
        return asyncio.run_coroutine_threadsafe(self._client.get(path), self._loop).result(60)

    def post(self, path: str, *bodies: str | dict[str, Any]) -> Sequence[httpx.Response]:
        """Return the answer to each body."""

        async def ask() -> Sequence[httpx.Response]:
            headers = {"content-type": "application/json"}
            sent = [
                self._client.post(path, json=body)
                if isinstance(body, dict)
                else self._client.post(path, content=body, headers=headers)
                for body in bodies
            ]
            return await asyncio.gather(*sent)

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(60)


@contextmanager
def in_process(
    engine: InferenceEngine,
    tokenizer: TextTokenizer,
    *,
    adapters: Mapping[str, str] | None = None,
    cache_bytes: int = 0,
) -> Iterator[InProcess]:
    """Serve ``engine``, with folders of its adapters by name, until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    engines: list[threading.Thread] = []

    def run(connection: EngineConnection) -> None:
        run_engine_loop(engine, connection, heartbeat=lambda phase: None)
        connection.close()

    def start(number: int, pool: ReplicaPool) -> ReplicaClient:
        local, remote = socket.socketpair()
        local.setblocking(False)
        engines.append(threading.Thread(target=run, args=(EngineConnection(remote),)))
        engines[-1].start()
        return ReplicaClient(number, local, process=None, on_ready=pool.on_ready, on_lost=pool.on_lost)

    async def begin() -> tuple[ReplicaPool, httpx.AsyncClient]:
        pool = ReplicaPool(1, start, stall_s=60, build_timeout_s=60)
        limits = ServerLimits(
            name=MODEL,
            adapters=adapters or {},
            capacity=32,
            max_queue=256,
            max_choices=64,
            queue_timeout_s=60,
            request_timeout_s=60,
        )
        engine_client = EngineClient(limits, pool=pool, results=ResultCache(cache_bytes, ttl_s=60))
        pool.open()
        engine_client.tokenizer, engine_client.fingerprint_hash = tokenizer, "0"
        while pool.max_model_len is None:
            await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(app=make_app(engine_client), raise_app_exceptions=False)
        return pool, httpx.AsyncClient(transport=transport, base_url="http://server")

    pool, client = asyncio.run_coroutine_threadsafe(begin(), loop).result(60)
    try:
        yield InProcess(loop, client)
    finally:

        async def end() -> None:
            await client.aclose()
            await pool.close()

        asyncio.run_coroutine_threadsafe(end(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        for each in engines:
            each.join()
