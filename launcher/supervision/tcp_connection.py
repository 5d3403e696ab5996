"""TCP connections of host agents that the session cannot reach: the agents connect to it.

Each side proves that it belongs to the run (see `handshake`).
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.errors import EnvironmentProblem
from launcher.protocol.messages import FROM_AGENT, AgentMessage
from launcher.protocol.wire import MessageReader
from launcher.supervision.connection import AgentConnection
from launcher.supervision.handshake import HANDSHAKE_S, HandshakeError, HandshakeServer, authenticate

Say = Callable[[str], None]

_CHUNK = 1 << 16
_TICK_S = 0.5
_REPORT_EVERY_S = 30.0
_BACKLOG = 1024
_MAX_PENDING = 256
"""Peers in their handshake at a time."""
_MAX_REPORTED_REFUSALS = 20
_SHORTAGE_S = 0.05
"""Pause when the process has no descriptor left for another peer."""


@dataclass(eq=False)
class _PendingPeer:
    """A peer that is still in its handshake."""

    peer: socket.socket
    address: str
    admission: HandshakeServer
    deadline: float


class AgentListener:
    """Where the session waits for its agents: one connection for each known host, and none for anybody else.

    Peers are served side by side, in one thread. Whatever goes wrong with one of them ends that one alone.

    Args:
        port: to listen on.
        key: that both ends know.
        hosts: name in the plan, by the index with which a host's agent calls itself.
        handshake_s: time for each peer's whole handshake.
    """

    def __init__(self, *, port: int, key: bytes, hosts: Mapping[int, str], handshake_s: float = HANDSHAKE_S) -> None:
        self._key, self._hosts, self._handshake_s = key, hosts, handshake_s
        self._listener = socket.create_server(("", port), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._pending: list[_PendingPeer] = []
        self._arrived: dict[int, TcpConnection] = {}
        self._num_refused = 0

    def gather(self, *, timeout_s: float, say: Say) -> dict[str, TcpConnection]:
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
                raise EnvironmentProblem(f"{_shorten_names(absent)} did not appear within {timeout_s:.0f} s")
            if now - said > _REPORT_EVERY_S:
                said = now
                refused = f" ({self._num_refused} connections were refused)" if self._num_refused else ""
                say(f"waiting for {_shorten_names(absent)}{refused}")
            self._turn(say)
        self._stop_listening()
        return {self._hosts[index]: connection for index, connection in self._arrived.items()}

    def close(self) -> None:
        """Stop listening and drop who has come."""
        self._stop_listening()
        for connection in self._arrived.values():
            connection.close()

    def _stop_listening(self) -> None:
        for pending in self._pending:
            pending.peer.close()
        self._pending.clear()
        self._selector.close()
        self._listener.close()

    def _turn(self, say: Say) -> None:
        """Wait a moment, serve every peer that has sent something, and end those whose time is up."""
        for key, _ in self._selector.select(_TICK_S):
            if key.data is None:
                self._accept(say)
            elif key.data in self._pending:  # else it was dropped for another a moment ago
                self._serve(key.data, say)
        now = time.monotonic()
        for pending in [pending for pending in self._pending if now > pending.deadline]:
            self._refuse(pending, f"it did not finish the handshake within {self._handshake_s:g} s", say)

    def _accept(self, say: Say) -> None:
        for _ in range(_MAX_PENDING):
            try:
                peer, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as problem:
                if problem.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room(say)
                    time.sleep(_SHORTAGE_S)
                return  # any other is the error of a peer that went while it waited in the queue
            peer.setblocking(False)
            if len(self._pending) >= _MAX_PENDING:
                self._make_room(say)
            admission = HandshakeServer(known=self._hosts, key=self._key)
            pending = _PendingPeer(peer, str(address[0]), admission, time.monotonic() + self._handshake_s)
            self._pending.append(pending)
            self._selector.register(peer, selectors.EVENT_READ, pending)

    def _make_room(self, say: Say) -> None:
        """Drop the oldest peer of the address that has the most: a pod is done in one round trip."""
        counts = Counter(pending.address for pending in self._pending)
        if counts:
            crowd, _ = counts.most_common(1)[0]
            oldest = next(pending for pending in self._pending if pending.address == crowd)
            self._refuse(oldest, f"{counts[crowd]} connections from there were open", say)

    def _serve(self, pending: _PendingPeer, say: Say) -> None:
        try:
            answer = pending.admission.take(pending.peer.recv(_CHUNK))
            if answer and pending.peer.send(answer) != len(answer):
                raise HandshakeError("it does not read what it is sent")
            index = pending.admission.index
            connection = None if index is None else TcpConnection(self._hosts[index], pending.peer)
        except BlockingIOError:
            return
        except Exception as problem:  # noqa: BLE001  (whatever a peer causes must end that peer alone)
            self._refuse(pending, str(problem) or repr(problem), say)
            return
        if index is None or connection is None:
            return
        self._forget(pending)
        earlier = self._arrived.pop(index, None)
        if earlier is not None:
            earlier.close()
        self._arrived[index] = connection

    def _refuse(self, pending: _PendingPeer, why: str, say: Say) -> None:
        self._forget(pending)
        pending.peer.close()
        self._num_refused += 1
        if self._num_refused <= _MAX_REPORTED_REFUSALS:
            say(f"refused a connection from {pending.address}: {why}")
        if self._num_refused == _MAX_REPORTED_REFUSALS:
            say("further refusals are counted, not printed")

    def _forget(self, pending: _PendingPeer) -> None:
        self._selector.unregister(pending.peer)
        self._pending.remove(pending)


class TcpConnection(AgentConnection):
    """The agent at the other end of a socket; how it ended cannot be seen from here.

    Args:
        host: its name in the plan.
        peer: where the handshake has taken place.
    """

    program = None

    def __init__(self, host: str, peer: socket.socket) -> None:
        self.host = host
        _configure_socket(peer)
        self._peer, self._outlet = peer, os.dup(peer.fileno())  # a selector tells reading and writing apart by number
        self._inbox, self._queue = MessageReader(FROM_AGENT), bytearray()
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

    def send(self, message: AgentMessage) -> None:
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

    def receive(self) -> list[AgentMessage] | None:
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


def connect_to_session(address: str, *, port: int, index: int, key: bytes, timeout_s: float, say: Say) -> socket.socket:
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
            peer = socket.create_connection((address, port), timeout=HANDSHAKE_S)
        except OSError as error:
            problem = error.strerror or str(error)
        else:
            try:
                authenticate(peer, index=index, key=key)
            except (HandshakeError, OSError) as error:
                peer.close()
                problem = str(error)
            else:
                _configure_socket(peer)
                return peer
        if time.monotonic() > deadline:
            raise EnvironmentProblem(
                f"the first pod, {address}:{port}, was not there within {timeout_s:.0f} s: {problem}"
            )
        if problem != said:
            said = problem
            say(f"waiting for the first pod, {address}:{port}: {problem}")
        time.sleep(_TICK_S)


def _configure_socket(peer: socket.socket) -> None:
    """Make a socket one that never blocks, sends at once, and notices a peer that vanished while both are silent."""
    peer.setblocking(False)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)


def _shorten_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
