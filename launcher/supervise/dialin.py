"""Agents that nobody can reach from outside: they dial in to the session over TCP, and prove that they belong to it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping

from launcher.errors import EnvironmentProblem
from launcher.supervise.connection import Connection
from launcher.supervise.handshake import HandshakeError, admit, knock
from launcher.supervise.messages import Message
from launcher.supervise.wire import Inbox

Say = Callable[[str], None]

_CHUNK = 1 << 16
_HANDSHAKE_S = 5.0
_TICK_S = 0.5
_SAY_EVERY_S = 30.0
_BACKLOG = 1024


class Gate:
    """Where the session waits for its agents: one connection for each known host, and none for anybody else.

    Args:
        port: to listen on.
        key: that both ends know.
        hosts: name in the plan, by the index with which a host's agent calls itself.
    """

    def __init__(self, *, port: int, key: bytes, hosts: Mapping[int, str]) -> None:
        self._key, self._hosts = key, hosts
        self._listener = socket.create_server(("", port), backlog=_BACKLOG)
        self._listener.settimeout(_TICK_S)
        self._arrived: dict[int, DialInConnection] = {}

    def gather(self, *, timeout_s: float, say: Say) -> dict[str, DialInConnection]:
        """Wait until every host's agent is there; return their connections by host.

        One that comes a second time was started again: its first connection is dropped.

        Raises:
            EnvironmentProblem: they were not all there within ``timeout_s``.
        """
        started = said = time.monotonic()
        while absent := [name for index, name in self._hosts.items() if index not in self._arrived]:
            now = time.monotonic()
            if now - started > timeout_s:
                self.close()
                raise EnvironmentProblem(f"{_some(absent)} did not appear within {timeout_s:.0f} s")
            if now - said > _SAY_EVERY_S:
                said = now
                say(f"waiting for {_some(absent)}")
            self._accept(say)
        self._listener.close()
        return {self._hosts[index]: connection for index, connection in self._arrived.items()}

    def close(self) -> None:
        """Stop listening and drop who has come."""
        self._listener.close()
        for connection in self._arrived.values():
            connection.close()

    def _accept(self, say: Say) -> None:
        try:
            peer, address = self._listener.accept()
        except TimeoutError:
            return
        try:
            peer.settimeout(_HANDSHAKE_S)
            index = admit(peer, known=self._hosts, key=self._key)
        except (HandshakeError, OSError) as problem:
            peer.close()
            say(f"refused a connection from {address[0]}: {problem}")
            return
        earlier = self._arrived.pop(index, None)
        if earlier is not None:
            earlier.close()
        self._arrived[index] = DialInConnection(self._hosts[index], peer)


class DialInConnection(Connection):
    """The agent at the other end of a socket; how it ended cannot be seen from here.

    Args:
        host: its name in the plan.
        peer: where the handshake has taken place.
    """

    program = None

    def __init__(self, host: str, peer: socket.socket) -> None:
        self.host = host
        prepare(peer)
        self._peer, self._outlet = peer, os.dup(peer.fileno())  # a selector tells reading and writing apart by number
        self._inbox, self._queue = Inbox(), bytearray()
        self._lock = threading.Lock()
        self._is_broken = False
        self.has_hung_up = False
        """The other end closed it, or died: what is merely cut off stays silent."""

    def fileno(self) -> int:
        """Return the socket."""
        return self._peer.fileno()

    def outlet(self) -> int | None:
        """Return the socket under another number while something waits."""
        return self._outlet if self._queue and not self._is_broken else None

    def send(self, message: Message) -> None:
        """Write to the socket."""
        with self._lock:
            self._queue += message.encode()
        self.flush()

    def flush(self) -> None:
        """Write what the socket takes."""
        with self._lock:
            while self._queue and not self._is_broken:
                try:
                    written = os.write(self._outlet, self._queue[:_CHUNK])
                except BlockingIOError:
                    return
                except OSError:
                    self._is_broken = True
                    return
                del self._queue[:written]

    def receive(self) -> list[Message] | None:
        """Read what has arrived; call it when ``fileno`` is readable."""
        try:
            data = self._peer.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.has_hung_up = not data
        return self._inbox.take(data)[0] if data else None

    def close(self) -> int:
        """Hang up."""
        with self._lock:
            self._is_broken = True
            self._peer.close()
            os.close(self._outlet)
        return 0


def dial(address: str, *, port: int, index: int, key: bytes, timeout_s: float, say: Say) -> socket.socket:
    """Return a connection to the session, however long it takes to be there.

    Args:
        address: where it will be; the name need not exist yet.
        port: of its gate.
        index: of this host.
        key: that both ends know.
        timeout_s: for how long to try.
        say: told why it does not work yet, each reason once.

    Raises:
        EnvironmentProblem: it was not there in time.
    """
    deadline, said = time.monotonic() + timeout_s, ""
    while True:
        try:
            peer = socket.create_connection((address, port), timeout=_HANDSHAKE_S)
        except OSError as error:
            problem = error.strerror or str(error)
        else:
            try:
                knock(peer, index=index, key=key)
            except (HandshakeError, OSError) as error:
                peer.close()
                problem = str(error)
            else:
                prepare(peer)
                return peer
        if time.monotonic() > deadline:
            raise EnvironmentProblem(
                f"the first pod, {address}:{port}, was not there within {timeout_s:.0f} s: {problem}"
            )
        if problem != said:
            said = problem
            say(f"waiting for the first pod, {address}:{port}: {problem}")
        time.sleep(_TICK_S)


def prepare(peer: socket.socket) -> None:
    """Make a socket one that never blocks, sends at once, and notices a peer that vanished while both are silent."""
    peer.setblocking(False)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
