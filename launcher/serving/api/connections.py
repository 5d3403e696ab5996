"""HTTP/1.1 connections of uvicorn, with limits to their number, their heads and the time that clients may take."""

from __future__ import annotations

import asyncio
import http
import json
import logging
import sys
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from launcher.serving.api.http_checks import MAX_HEAD_BYTES, check_head, network_of
from launcher.serving.api.problems import ApiError

_MOST_CHUNKS, _SMALL_CHUNK = 1024, 256
"""Chunks that any body may have; further ones must have so many bytes on average, for each takes time to read."""
_LINGER_S, _LINGER_BYTES = 10.0, 1 << 25
"""How long, and for how much, a client is listened to that sends on after its answer: closing at once would reset the
connection, and then the answer is lost before the client reads it."""
_OF_ONE_ADDRESS = 0.75
"""Share of all connections that one address may hold."""


class TinyChunks(h11.RemoteProtocolError):
    """A body that takes more time to put together than to send."""


class _Reader(h11.Connection):
    """One client's requests; refuses a body that consists of tiny chunks."""

    _chunks = _received = 0

    def next_event(self) -> Any:
        """Return what comes next."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._received = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._received += len(event.data)
            if self._chunks > _MOST_CHUNKS and self._received < _SMALL_CHUNK * self._chunks:
                raise TinyChunks(
                    f"the body has more than {_MOST_CHUNKS:,} chunks with less than {_SMALL_CHUNK} bytes on average; "
                    "send it with Content-Length, or in larger chunks"
                )
        return event


class _Transport:
    """A connection that, closed before a request has come whole, waits a little for the client to read its answer."""

    def __init__(self, transport: Any, owner: Any) -> None:
        self._transport, self._owner = transport, owner
        self.left: int | None = None
        """Bytes that are still passed over; ``None`` before the end."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more will be read or written."""
        return self.left is not None or bool(self._transport.is_closing())

    def close(self) -> None:
        """Close, once the client has stopped to send or has had time to."""
        if self.left is not None:
            return
        if self._transport.is_closing() or self._owner.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            self._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError:  # the client is gone already
            self._transport.close()
            return
        self.left = _LINGER_BYTES
        self._transport.resume_reading()
        self._owner.loop.call_later(_LINGER_S, self._transport.abort)

    def pass_over(self, data: bytes) -> None:
        """Count what the client still sends, and end the connection where it is too much."""
        assert self.left is not None
        self.left -= len(data)
        if self.left <= 0:
            self._transport.abort()


def protocol(max_connections: int, *, headers_s: float, reading_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with limits.

    Args:
        max_connections: that are open at the same time.
        headers_s: from a connection, or the first byte of a further request, to the end of its headers.
        reading_s: that a client may take nothing while there is more than the system holds for it; then it is gone.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what strangers send wrongly is no news
    of_one_address = max(1, int(_OF_ONE_ADDRESS * max_connections))
    open_by: Counter[str] = Counter()

    class Limited(H11Protocol):
        """One connection."""

        transport: Any
        _deadline: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None
        _address = ""

        def connection_made(self, transport: Any) -> None:
            """Take a connection, or say that there are too many."""
            super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
            self.conn = _Reader(h11.SERVER, MAX_HEAD_BYTES)
            self._address = network_of(self.client[0]) if self.client else ""
            open_by[self._address] += 1
            if len(self.connections) > max_connections or open_by[self._address] > of_one_address:
                self._refuse(ApiError(503, "too many connections", code="too_many_connections", retry_s=2))
                return
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            """Forget the connection."""
            open_by[self._address] -= 1
            if not open_by[self._address]:
                del open_by[self._address]
            self._calm()
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Read; whoever begins a request must also end its headers."""
            if self.transport.left is not None:
                self.transport.pass_over(data)
                return
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._calm()
            elif self.conn.trailing_data[0]:
                self._expect()

        def handle_events(self) -> None:
            """Go on with what has come, unless it begins with the head of a request that can be read in two ways."""
            if self.transport.left is not None:
                return
            if self.conn.their_state is h11.IDLE:
                problem = check_head(self.conn.trailing_data[0])
                if problem is not None:
                    self._refuse(problem)
                    return
            super().handle_events()

        def send_400_response(self, msg: str) -> None:
            """Say that this is no HTTP, unless an answer has begun already; called while h11's error is handled."""
            why = sys.exception()
            said = str(why) if isinstance(why, TinyChunks) else f"this is no valid HTTP request: {msg}"
            self._refuse(ApiError(400, said, code="invalid_http"))

        def on_response_complete(self) -> None:
            """Go on, unless the answer came before the body: nothing waits for that any more."""
            if self.conn.their_state is h11.SEND_BODY:
                self.transport.close()
            super().on_response_complete()

        def pause_writing(self) -> None:
            """Wait for the client to take what is there, but not for ever: closing would wait as long."""
            super().pause_writing()
            self._reading = self.loop.call_later(reading_s, self.transport.abort)

        def resume_writing(self) -> None:
            """Go on."""
            self._stop_waiting()
            super().resume_writing()

        def _stop_waiting(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

        def _expect(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(headers_s, self._give_up)

        def _calm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
                self._refuse(ApiError(408, f"no request came within {headers_s:g} s", code="header_timeout"))

        def _refuse(self, problem: ApiError) -> None:
            """Answer outside of any request, and close; a request that has begun counts as gone."""
            has_begun = False
            if self.cycle is not None and not self.cycle.response_complete:
                has_begun = self.cycle.response_started
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if not has_begun:
                body = json.dumps(problem.body()).encode()
                reason = http.HTTPStatus(problem.status).phrase
                headers = {**problem.headers, "content-type": "application/json", "connection": "close"}
                head = f"HTTP/1.1 {problem.status} {reason}\r\ncontent-length: {len(body)}\r\n"
                head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                self.transport.write(f"{head}\r\n".encode() + body)
            self.transport.close()

    return Limited
