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
_READING_S = 60.0
"""A client that takes nothing for so long is gone; so is one whose machine does not answer."""
_ALIVE_S = 30
"""After so much silence the system asks whether the client's machine is there."""
_LAST_S = 3
"""Time that answers get to leave once there is nothing to wait for."""


_WATCHED = {
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): int(_READING_S * 1000),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): _ALIVE_S,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): _ALIVE_S // 3,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
}
"""How a client is noticed that vanished without a word, as one does whose machine or network is gone."""


class Server(uvicorn.Server):
    """Ends when it is told to by ``should_exit``, never by a signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def make_server(app: Any, *, max_connections: int, headers_s: float, reading_s: float = _READING_S) -> Server:
    """Return a server for an ASGI application; what its arguments limit, ``protocol`` says."""
    config = uvicorn.Config(
        app,
        http=protocol(max_connections, headers_s=headers_s, reading_s=reading_s),
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
        for option, value in _WATCHED.items():  # connections inherit them
            listener.setsockopt(*option, value)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
