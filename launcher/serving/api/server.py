"""uvicorn as this program runs it: on a socket that is open already, without its own handling of signals."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from launcher.serving.api.connections import protocol

_BACKLOG = 2048
_KEEP_ALIVE_S = 15
_LAST_S = 3
"""Time that answers get to leave once there is nothing to wait for."""


class Server(uvicorn.Server):
    """Ends when it is told to by ``should_exit``, never by a signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def make_server(app: Any, *, max_connections: int, headers_s: float) -> Server:
    """Return a server for an ASGI application; what its arguments limit, ``protocol`` says."""
    config = uvicorn.Config(
        app,
        http=protocol(max_connections, headers_s=headers_s),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_S,
        server_header=False,
        proxy_headers=False,
    )
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        OSError: nobody can.
    """
    family, kind, protocol_number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol_number)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
