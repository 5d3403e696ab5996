"""Clients that are gone: nothing of them stays open, and no error is logged."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from launcher.inference.server.api_server import listen, make_server
from launcher.inference.server.responses import ApiError, EventData, EventStream
from tests.helpers import wait_for
from tests.inference.server.conftest import MODEL, Start


def test_those_that_are_gone_are_not_waited_for(serve: Start) -> None:
    slow = serve("job.echo_step_s=0.05", "job.max_num_seqs=4")
    connections = []
    for number in range(9):
        connection = socket.create_connection(("127.0.0.1", slow.port), timeout=30)
        body = {"model": MODEL, "prompt": f"gone {number}", "max_tokens": 240, "stream": True}
        payload = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(payload)}\r\n\r\n"
        connection.sendall(head.encode() + payload)
        connections.append(connection)
    wait_for(lambda: slow.metric("num_requests_running") + slow.metric("num_requests_waiting") == 9)
    for connection in connections:
        connection.close()
    assert slow.stop() == 0
    assert "draining: 0 requests are open" in slow.output
    assert "never retrieved" not in slow.output


def explain(trouble: Exception) -> ApiError:
    return ApiError(500, str(trouble))


@pytest.mark.parametrize("how", ["ends", "fails", "waits"])
def test_a_client_goes_in_the_moment_that_its_stream(how: str) -> None:
    ended, complaints = [], []

    async def go() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: complaints.append(what["message"]))
        moment = asyncio.Event()

        async def events() -> AsyncGenerator[EventData]:
            yield {"first": True}
            await moment.wait()
            if how == "fails":
                raise ValueError(how)
            if how == "waits":
                await asyncio.Event().wait()

        async def receive() -> Any:
            await moment.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            asyncio.get_running_loop().call_later(0.05, moment.set)

        stream = EventStream(events(), explain=explain, on_end=lambda: ended.append(how), headers={})
        await stream({"type": "http", "method": "POST"}, receive, send)
        gc.collect()

    asyncio.run(go())
    assert ended == [how]
    assert not complaints


def test_events_that_are_all_there_leave_turns_to_others() -> None:
    async def go() -> None:
        sent: list[Any] = []

        async def events() -> AsyncGenerator[EventData]:
            for number in range(10_000):
                yield {"number": number}

        async def receive() -> Any:
            while len(sent) < 10:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        stream = EventStream(events(), explain=explain, on_end=lambda: None, headers={})
        await stream({"type": "http", "method": "POST"}, receive, send)
        assert len(sent) < 20

    asyncio.run(go())


def test_a_client_that_takes_nothing_is_gone() -> None:
    async def go() -> None:
        gone = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def pour() -> None:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                while True:
                    await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})

            pouring = asyncio.create_task(pour())
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            pouring.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pouring

        listener = listen("127.0.0.1", 0)
        server = make_server(app, max_connections=4, headers_timeout_s=30, write_timeout_s=0.3)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            async with asyncio.timeout(30):
                await gone.wait()
                while server.server_state.connections:
                    await asyncio.sleep(0.01)
        server.should_exit = True
        await serving

    asyncio.run(go())
