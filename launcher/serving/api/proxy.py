"""Every request handed on to another server of this machine, its answer handed back as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import h11
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from launcher.serving.api.problems import ApiError

_CHUNK = 1 << 16
_PASSED_ON = frozenset({b"accept", b"content-type", b"user-agent", b"x-request-id"})
_KEPT_BACK = frozenset({b"connection", b"transfer-encoding", b"keep-alive", b"date", b"server"})
_PROBE_S = 5.0


class Proxy:
    """An ASGI application that answers with what another server says.

    Args:
        host: of that server.
        port: of that server.
        most: requests that are handed on at a time.
    """

    def __init__(self, host: str, port: int, *, most: int) -> None:
        self._host, self._port, self._most = host, port, most
        self.is_ready = False
        """Whether the server behind answered when last asked; kept by whoever supervises it."""
        self.draining = False
        self.open_requests = self.num_ended = self.rejected = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["path"].startswith("/health/"):
            await self._health(scope["path"], scope, receive, send)
            return
        try:
            self._check()
            body = (await receive()).get("body", b"")
            await self._hand_on(scope, receive, send, body)
        except ApiError as problem:
            await problem.response()(scope, receive, send)

    async def answers(self) -> bool:
        """Return whether the server behind says that it is well."""
        with contextlib.suppress(OSError, TimeoutError, h11.RemoteProtocolError):
            async with asyncio.timeout(_PROBE_S):
                status = 0
                async for event in self._ask("GET", b"/health", [], b""):
                    if isinstance(event, h11.Response):
                        status = event.status_code
                return status == 200
        return False

    def break_off(self) -> None:
        """End every request that is not answered."""
        for task in self._tasks:
            task.cancel()

    def _check(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is ending", code="draining", retry_s=5, closes=True)
        if not self.is_ready:
            raise ApiError(503, "vLLM does not answer yet", code="starting", retry_s=5)
        if self.open_requests >= self._most:
            self.rejected += 1
            raise ApiError(429, "too many requests are waiting", code="queue_full", retry_s=2)

    async def _health(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path == "/health/live":
            answer = JSONResponse({"status": "live"})
        elif self.is_ready and not self.draining:
            answer = JSONResponse({"status": "ready"})
        else:
            why = "the server is ending" if self.draining else "vLLM does not answer"
            answer = JSONResponse({"status": "not ready", "why": why}, status_code=503)
        await answer(scope, receive, send)

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Hand a request on; break it off when its client is gone, and say so when the server behind is."""
        self.open_requests += 1
        begun = False

        async def relay() -> None:
            nonlocal begun
            headers = [(name, value) for name, value in scope["headers"] if name in _PASSED_ON]
            target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
            async for event in self._ask(scope["method"], target, headers, body):
                if isinstance(event, h11.Response):
                    kept = [
                        (name, value) for name, value in event.headers.raw_items() if name.lower() not in _KEPT_BACK
                    ]
                    begun = True
                    await send({"type": "http.response.start", "status": event.status_code, "headers": kept})
                elif isinstance(event, h11.Data):
                    await send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        work = asyncio.create_task(relay())
        gone = asyncio.ensure_future(_disconnected(receive))
        self._tasks.add(work)
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.cancelled():
                raise ApiError(503, "the server is ending", code="draining", retry_s=5, closes=True)
            if work.done():
                await work
        except (OSError, h11.RemoteProtocolError) as error:
            if begun:
                raise  # the answer is cut, and the connection with it
            raise ApiError(502, "vLLM broke off before it answered", code="engine_failed") from error
        finally:
            self.open_requests -= 1
            self.num_ended += 1
            self._tasks.discard(work)
            for each in (work, gone):
                each.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _ask(
        self, method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> AsyncGenerator[h11.Event]:
        """Yield the events of an answer."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            link = h11.Connection(h11.CLIENT)
            more = [(b"host", f"{self._host}:{self._port}".encode()), (b"content-length", str(len(body)).encode())]
            request = h11.Request(method=method, target=target, headers=[*headers, *more, (b"connection", b"close")])
            for event in (request, h11.Data(data=body), h11.EndOfMessage()):
                writer.write(link.send(event) or b"")
            await writer.drain()
            while True:
                came = link.next_event()
                if isinstance(came, h11.EndOfMessage | h11.ConnectionClosed):
                    return
                if isinstance(came, h11.Event):
                    yield came
                else:
                    link.receive_data(await reader.read(_CHUNK))
        finally:
            writer.close()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
