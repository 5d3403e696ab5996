"""Servers behind a load balancer whose behaviour a test chooses, byte for byte."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

_HEAD = b"HTTP/1.1 %s\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Request:
    """One request that arrived whole."""

    line: str
    headers: dict[str, str]
    body: bytes


class Upstream:
    """A server on a port of its own.

    Args:
        respond: gets the connection of each request that is no check of health, and may send what it likes.
        is_ready: what its readiness endpoint says.
    """

    def __init__(self, respond: Callable[[socket.socket], None], *, is_ready: bool = True) -> None:
        self.respond, self.is_ready = respond, is_ready
        self.requests: list[Request] = []
        self.num_checks = 0
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.upstream = self  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        upstream = cast(Any, self.server).upstream
        line = self.rfile.readline().decode().strip()
        headers: dict[str, str] = {}
        while field := self.rfile.readline().decode().strip():
            name, _, value = field.partition(":")
            headers[name.lower()] = value.strip()
        if not line:
            return
        body = self.rfile.read(int(headers.get("content-length", 0)))
        with contextlib.suppress(OSError):
            if line.startswith("GET /health/ready") and headers.get("x-forwarded-for") is None:
                upstream.num_checks += 1
                self.request.sendall(response(b"200 OK" if upstream.is_ready else b"503 Service Unavailable", b"{}"))
                return
            upstream.requests.append(Request(line, headers, body))
            upstream.respond(self.request)


def response(status: bytes, body: bytes) -> bytes:
    """Return a whole response."""
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body)


def chunk(data: bytes) -> bytes:
    """Return a chunk of a stream."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def answer(connection: socket.socket) -> None:
    """Send a stream of two tokens."""
    connection.sendall(_HEAD % b"200 OK" + chunk(b"data: 1\n\n") + chunk(b"data: 2\n\n") + chunk(b""))


def drop(connection: socket.socket) -> None:
    """Close without a response."""


def cut(connection: socket.socket) -> None:
    """Send one token, and close inside the stream."""
    connection.sendall(_HEAD % b"200 OK" + chunk(b"data: 1\n\n"))


def drain(connection: socket.socket) -> None:
    """Refuse, as a server does that finishes what it has accepted."""
    connection.sendall(response(b"503 Service Unavailable", b'{"error": {"code": "draining"}}'))


class Held:
    """A stream that goes on when the test says so.

    Args:
        has_begun: whether the first token is sent at once.
    """

    def __init__(self, *, has_begun: bool = True) -> None:
        self._has_begun, self.is_asked = has_begun, threading.Event()
        self.goes_on, self.is_left = threading.Event(), threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        """Send a token, wait, and send the rest; notice a client that leaves."""
        self.is_asked.set()
        if self._has_begun:
            connection.sendall(_HEAD % b"200 OK" + chunk(b"data: 1\n\n"))
        connection.settimeout(0.02)
        while not self.goes_on.is_set():
            if _is_closed(connection):
                self.is_left.set()
                return
        connection.sendall(chunk(b"data: 2\n\n") + chunk(b""))


class Stepped:
    """A stream of three tokens, each of which is sent when the test says so."""

    def __init__(self) -> None:
        self.may_send = threading.Semaphore(0)

    def __call__(self, connection: socket.socket) -> None:
        """Send the head, then a token for each time that ``may_send`` is released."""
        connection.sendall(_HEAD % b"200 OK")
        for number in (1, 2, 3):
            if not self.may_send.acquire(timeout=60):
                return
            connection.sendall(chunk(b"data: %d\n\n" % number))
        connection.sendall(chunk(b""))


class Poured:
    """A stream without end, which stops when nothing reads it."""

    def __init__(self) -> None:
        self.is_left = threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        """Send a token every 10 ms until the connection is closed."""
        connection.sendall(_HEAD % b"200 OK" + chunk(b"data: 1\n\n"))
        connection.settimeout(0.01)
        try:
            while True:
                connection.sendall(chunk(b"data: 2\n\n"))
                if _is_closed(connection):
                    return
        finally:
            self.is_left.set()


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed or reset a connection, on which it has nothing more to send."""
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    except ConnectionError:
        return True
