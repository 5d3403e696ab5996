"""The queue is shared: one key, or one address without keys, leaves a quarter of it to others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from launcher.inference.server.app import make_app
from launcher.inference.server.engine_client import EngineClient, ServerLimits
from launcher.inference.server.http_limits import AllowedHosts, TrustedProxies
from launcher.inference.server.middleware import AdmissionMiddleware, ApiKeys, RateLimiter
from launcher.inference.server.proxy import Proxy, ProxyLimits
from launcher.inference.server.request_state import RequestState
from launcher.inference.server.result_cache import ResultCache
from launcher.inference.tokenizer import byte_tokenizer
from tests.inference.server.loop import MODEL, InstantPool

CAPACITY, MAX_QUEUE = 4, 8
SHARE = CAPACITY + 6


class PendingPool(InstantPool):
    """Keeps every request until it is cancelled."""

    def __init__(self) -> None:
        super().__init__(256)
        self.num_submitted = 0

    @property
    def in_flight(self) -> int:
        return self.num_submitted

    def submit(self, state: RequestState) -> None:
        self.num_submitted += 1

    def release(self, state: RequestState) -> None:
        self.num_submitted -= 1


def own_engine() -> Any:
    limits = ServerLimits(
        name=MODEL, capacity=CAPACITY, max_queue=MAX_QUEUE, max_choices=64, queue_timeout_s=60, request_timeout_s=60
    )
    client = EngineClient(limits, pool=PendingPool(), results=ResultCache(0, ttl_s=60))
    client.tokenizer = byte_tokenizer()
    return make_app(client)


def proxy_of_vllm() -> Any:
    limits = ProxyLimits(
        capacity=CAPACITY, max_queue=MAX_QUEUE, max_choices=64, queue_timeout_s=60, request_timeout_s=60
    )
    proxy = Proxy("127.0.0.1", 1, limits=limits, authorization="Bearer x")
    proxy.is_ready = True

    async def pending(*_: Any) -> Any:
        await asyncio.Event().wait()

    proxy._request = pending  # type: ignore[method-assign, assignment]
    return proxy


async def turns() -> None:
    """Let every task go on until it waits for an engine."""
    for _ in range(500):
        await asyncio.sleep(0)


@pytest.mark.parametrize("keys", [("one", "two"), ()], ids=["keys", "addresses"])
@pytest.mark.parametrize("app", [own_engine, proxy_of_vllm])
def test_one_client_leaves_a_quarter_of_the_queue_to_others(app: Any, keys: tuple[str, ...]) -> None:
    async def go() -> None:
        guarded = AdmissionMiddleware(
            app(),
            keys=ApiKeys(keys),
            hosts=AllowedHosts("127.0.0.1", ()),
            proxies=TrustedProxies(),
            rates=RateLimiter(None),
            max_body_bytes=1 << 20,
            body_timeout_s=60,
            reject=lambda reason: None,
        )

        def client(number: int) -> httpx.AsyncClient:
            address = "192.0.2.1" if keys else f"192.0.2.{number + 1}"
            transport = httpx.ASGITransport(guarded, client=(address, 1))
            headers = {"authorization": f"Bearer {keys[number]}"} if keys else {}
            return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)

        async with client(0) as greedy, client(1) as other:

            def ask(sender: httpx.AsyncClient, n: int) -> asyncio.Task[httpx.Response]:
                body = json.dumps({"model": MODEL, "prompt": "a", "n": n, "temperature": 1})
                return asyncio.create_task(sender.post("/v1/completions", content=body))

            pending = [ask(greedy, SHARE - 1), ask(greedy, 1)]
            await turns()
            beyond = ask(greedy, 1)
            await turns()
            assert beyond.done()
            refused = beyond.result()
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert "of this client" in refused.json()["error"]["message"]
            assert "retry-after" in refused.headers
            pending.append(ask(other, CAPACITY + MAX_QUEUE - SHARE))
            await turns()
            assert not any(task.done() for task in pending)
            pending[1].cancel()
            await asyncio.gather(pending[1], return_exceptions=True)
            pending.append(ask(greedy, 1))  # in the place that was given back
            await turns()
            assert not pending[-1].done()
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    asyncio.run(go())
