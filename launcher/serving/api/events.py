"""Answers that watch their client: a body that is given up when nobody waits for it, and streams of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from launcher.serving.api.problems import ApiError, as_headers

KEEP_ALIVE_S = 5.0
"""A stream that has nothing to say for so long sends a comment, so that nobody in between takes it for dead."""

Data = dict[str, Any]


async def until_gone(request: Request, work: Awaitable[Response]) -> Response:
    """Return the answer that ``work`` makes; break it off as soon as its client is gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        return Response(status_code=499)  # nobody reads it
    finally:
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await each


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, each the JSON of one object, ``[DONE]`` at the end.

    What goes wrong before the first event is an ordinary answer with its status; later it is an event.

    Args:
        events: the objects.
        explain: what a client is told of an exception.
        on_end: called when it is over, whatever has happened.
        headers: besides those of a stream.
    """

    def __init__(
        self,
        events: AsyncGenerator[Data],
        *,
        explain: Callable[[Exception], ApiError],
        on_end: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        super().__init__(headers=headers)
        self._events, self._explain, self._on_end, self._extra = events, explain, on_end, headers
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until there is nothing more, or nobody to send to."""
        sending = asyncio.ensure_future(self._send_all(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            try:
                for each in (sending, gone):
                    each.cancel()
                await asyncio.gather(sending, gone, return_exceptions=True)
                with contextlib.suppress(asyncio.CancelledError):
                    await self._events.aclose()
            finally:
                self._on_end()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        coming: asyncio.Future[Data] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self._events))
                await asyncio.wait({coming}, timeout=KEEP_ALIVE_S)
                if not coming.done():
                    await self._write(send, b": waiting\n\n")
                    continue
                data, coming = coming.result(), None
                await self._write(send, _event(json.dumps(data, ensure_ascii=False, separators=(",", ":"))))
        except StopAsyncIteration:
            await self._write(send, _event("[DONE]"), more=False)
        except Exception as trouble:  # noqa: BLE001  (every one is told to the client)
            problem = self._explain(trouble)
            if not self._has_begun:
                await problem.response()(scope, receive, send)
                return
            await self._write(send, _event(json.dumps(problem.body(), ensure_ascii=False)))
            await self._write(send, _event("[DONE]"), more=False)
        finally:
            if coming is not None:  # it may have ended in the moment that the client went: somebody must look at it
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        """Send some bytes; how long a client may take them, the connection knows."""
        if not self._has_begun:
            self._has_begun = True
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # nginx would hold events back
                **self._extra,
            }
            await send({"type": "http.response.start", "status": 200, "headers": as_headers(headers)})
        await send({"type": "http.response.body", "body": data, "more_body": more})


def _event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()
