"""HTTP/1.1 connections of uvicorn, with limits to their number and to how long nothing may come or be taken."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from launcher.serving.api.problems import ApiError


def protocol(max_connections: int, *, headers_s: float, reading_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with limits.

    Args:
        max_connections: that are open at the same time.
        headers_s: from a connection, or the first byte of a further request, to the end of its headers.
        reading_s: that a client may take nothing while there is more than the system holds for it; then it is gone.
    """

    class Limited(H11Protocol):
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Take a connection, or say that there are too many."""
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                problem = ApiError(503, "too many connections", code="too_many_connections", retry_s=2)
                self._say_and_close(b"503 Service Unavailable", problem)
                return
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            """Forget the connection."""
            self._calm()
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Read; whoever begins a request must also end its headers."""
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._calm()
            elif self.conn.trailing_data[0]:
                self._expect()

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
                problem = ApiError(408, f"no request came within {headers_s:g} s", code="header_timeout")
                self._say_and_close(b"408 Request Timeout", problem)

        def _say_and_close(self, status: bytes, problem: ApiError) -> None:
            body = json.dumps(problem.body()).encode()
            head = b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\nconnection: close\r\n"
            head += b"".join(f"{name}: {value}\r\n".encode() for name, value in problem.headers.items())
            self.transport.write(head + f"content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

    return Limited
