"""Limits and time limits before vLLM, with a server behind the proxy that answers when the test lets it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from launcher.inference.server.proxy import Proxy, ProxyLimits
from tests.ports import free_port

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\ndata: 1\n\n"


class Behind:
    """A server that says a first event, and the rest once ``go`` is set; it notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.heads: list[bytes] = []
        self.go, self.left = asyncio.Event(), asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.asked.append(body)
        self.heads.append(head)
        if nonsense := body.get("nonsense"):
            writer.write(nonsense.encode())
            writer.close()
            return
        if body.get("endless"):
            writer.write(STREAM)
            assert await reader.read() == b"", "more than one request on a connection"
            self.left.set()
            writer.close()
            return
        if not body.get("silent"):
            writer.write(STREAM)
        await self.go.wait()
        writer.write(b"" if body.get("breaks") else b"data: [DONE]\n\n")
        writer.close()


@asynccontextmanager
async def proxied(**limits: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Behind, Proxy]]:
    """Yield a client, the server behind and the proxy between them."""
    behind = Behind()
    server = await asyncio.start_server(behind.answer, "127.0.0.1", 0)
    usual = {"capacity": 2, "max_queue": 1, "max_choices": 8, "queue_timeout_s": 60.0, "request_timeout_s": 60.0}
    proxy = Proxy(
        "127.0.0.1",
        server.sockets[0].getsockname()[1],
        limits=ProxyLimits(**{**usual, **limits}),
        authorization="Bearer x",
    )
    proxy.is_ready = True
    async with server, httpx.AsyncClient(transport=httpx.ASGITransport(proxy), base_url="http://localhost") as client:
        try:
            yield client, behind, proxy
        finally:  # where a test fails too: what is left open would fail another test
            behind.go.set()


async def ask(client: httpx.AsyncClient, **body: Any) -> tuple[int, str]:
    """Return the status, and the code of the error or the text."""
    answer = await client.post("/v1/completions", json=body)
    return answer.status_code, answer.json()["error"]["code"] if answer.is_error else answer.text


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


def test_sequences_are_handed_on_in_turn_and_no_more_than_fit() -> None:
    async def go() -> None:
        async with proxied() as (client, behind, proxy):
            running = asyncio.create_task(ask(client, n=2, number=1))
            await until(lambda: behind.asked)
            queued = asyncio.create_task(ask(client, number=2))
            await until(lambda: proxy.open_requests == 2)
            for _ in range(100):
                await asyncio.sleep(0)
            assert await ask(client, number=3) == (429, "queue_full")
            assert await ask(client, prompt=["a"] * 3, n=3) == (400, "invalid_value")
            assert await ask(client, n=9) == (400, "invalid_value")
            assert [body["number"] for body in behind.asked] == [1]
            behind.go.set()
            assert (await running)[1] == (await queued)[1] == "data: 1\n\ndata: [DONE]\n\n"
            assert [body["number"] for body in behind.asked] == [1, 2]
            assert (await ask(client, n=8))[0] == 200  # more than fit, but alone
            assert proxy.open_requests == 0

    asyncio.run(go())


@pytest.mark.parametrize("field", ["n", "best_of"])
@pytest.mark.parametrize("value", ["1000", 1000.0, 0, -1, True, [2], {}], ids=repr)
def test_a_count_of_sequences_that_is_no_whole_number_is_refused(field: str, value: object) -> None:
    """The server behind reads "1000" and 1e3 as a number."""

    async def go() -> None:
        async with proxied() as (client, behind, _):
            assert (await ask(client, **{field: value}))[0] == 400
            assert not behind.asked

    asyncio.run(go())


def test_a_client_waits_for_its_turn_and_for_its_answer_no_longer_than_allowed() -> None:
    async def go() -> None:
        async with proxied(capacity=1, queue_timeout_s=0.1) as (client, behind, _):
            running = asyncio.create_task(ask(client))
            await until(lambda: behind.asked)
            assert await ask(client) == (408, "queue_timeout")
            behind.go.set()
            assert (await running)[0] == 200
        async with proxied(request_timeout_s=0.3) as (client, behind, _):
            assert await ask(client, silent=True) == (504, "request_timeout")
            status, text = await ask(client)
            assert status == 200, "its stream has begun"
            *_, last, end, _ = text.split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
            assert end == "data: [DONE]"
            behind.go.set()
            assert (await ask(client))[1].endswith("data: [DONE]\n\n")

    asyncio.run(go())


def test_a_client_that_goes_while_it_waits_leaves_its_place() -> None:
    async def go() -> None:
        async with proxied(capacity=1) as (client, behind, proxy):
            running = asyncio.create_task(ask(client))
            await until(lambda: behind.asked)
            sent: list[Any] = []
            gone = asyncio.Event()
            body = iter([{"type": "http.request", "body": b"{}", "more_body": False}])

            async def receive() -> Any:
                if (message := next(body, None)) is not None:
                    return message
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
            waiting = asyncio.create_task(proxy(scope, receive, send))
            await until(lambda: proxy.open_requests == 2)
            gone.set()
            await waiting
            queued = asyncio.create_task(ask(client))  # there is one place
            await until(lambda: proxy.open_requests == 2)
            behind.go.set()
            assert (await running)[0] == (await queued)[0] == 200
            assert not sent
            assert len(behind.asked) == 2

    asyncio.run(go())


def test_a_server_that_is_not_there_yet_is_asked_again_later() -> None:
    async def go() -> None:
        async with proxied() as (client, _, proxy):
            proxy._url = f"http://127.0.0.1:{free_port()}"
            answer = await client.post("/v1/completions", json={})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "starting")
            assert answer.headers["retry-after"] == "5"

    asyncio.run(go())


def test_a_server_that_breaks_off_is_said_to() -> None:
    async def go() -> None:
        async with proxied() as (client, behind, _):
            behind.go.set()
            assert await ask(client, silent=True, breaks=True) == (502, "engine_failed")

    asyncio.run(go())


@pytest.mark.parametrize(
    "nonsense", ["hello\r\n\r\n", "HTTP/1.1 many OK\r\n\r\n", "HTTP/1.1 200 OK\r\nno header\r\n\r\n", "HTTP/1.1 200"]
)
def test_a_server_that_does_not_speak_http_is_said_to_fail(nonsense: str) -> None:
    async def go() -> None:
        async with proxied() as (client, _, _proxy):
            assert await ask(client, nonsense=nonsense) == (502, "engine_failed")

    asyncio.run(go())


def test_a_client_that_goes_ends_its_request_at_the_server_behind() -> None:
    async def go() -> None:
        async with proxied() as (_, behind, proxy):
            gone, sent = asyncio.Event(), list[Any]()
            body = iter([{"type": "http.request", "body": b'{"endless": true}', "more_body": False}])

            async def receive() -> Any:
                if (message := next(body, None)) is not None:
                    return message
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/completions",
                "query_string": b"a=%41",
                "headers": [],
            }
            asking = asyncio.create_task(proxy(scope, receive, send))
            await until(lambda: len(sent) == 2)
            assert sent[1]["body"] == b"data: 1\n\n", "the event was kept back"
            assert not behind.left.is_set()
            gone.set()
            await asking
            await until(behind.left.is_set)
            assert proxy.open_requests == 0
            assert behind.heads[0].startswith(b"POST /v1/completions?a=%41 HTTP/1.1\r\n")
            assert b"encoding" not in behind.heads[0].lower(), "the answer must not be compressed"

    asyncio.run(go())


def test_headers_of_the_caller_are_forwarded_only_where_named() -> None:
    async def go() -> None:
        async with proxied() as (client, behind, _):
            behind.go.set()
            headers = {
                "authorization": "Bearer client",
                "cookie": "a=b",
                "accept-encoding": "gzip",
                "x-request-id": "7",
            }
            assert (await client.post("/v1/completions", json={}, headers=headers)).status_code == 200
            head = behind.heads[0].lower()
            assert b"x-request-id: 7" in head
            assert b"authorization: bearer x\r\n" in head
            assert not any(word in head for word in (b"bearer client", b"cookie", b"gzip"))

    asyncio.run(go())


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}, "messages.0.content.0.image_url.url"),
        ({"type": "input_image", "image_url": "HTTPS://x/"}, "messages.0.content.0.image_url"),
        ({"type": "image", "source": {"type": "url", "url": "file:///x"}}, "messages.0.content.0.source.url"),
    ],
)
def test_addresses_that_vllm_would_fetch_are_refused(part: dict[str, Any], field: str) -> None:
    async def go() -> None:
        async with proxied() as (client, behind, _):
            body = {"messages": [{"role": "user", "content": [part]}]}
            answer = await client.post("/v1/chat/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
            behind.go.set()
            body["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}]
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
            assert behind.asked == [body]

    asyncio.run(go())
