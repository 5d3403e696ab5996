"""TCP connections from host agents to the session, where the session cannot reach the hosts.

Both sides prove that they belong to the run (see `handshake`).
"""

from __future__ import annotations

import errno
import os
import resource
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.errors import EnvironmentProblem
from launcher.protocol.messages import FROM_AGENT, AgentMessage
from launcher.protocol.wire import MessageReader
from launcher.supervision.connection import CHUNK_BYTES, AgentConnection, WriteBuffer
from launcher.supervision.handshake import HANDSHAKE_S, HandshakeError, HandshakeServer, authenticate

Say = Callable[[str], None]

_TICK_S = 0.5
_REPORT_EVERY_S = 30.0
_BACKLOG = 1024
MAX_PENDING = 256
"""Peers that may be in their handshake at a time."""
_MAX_REPORTED_REJECTIONS = 20
_SHORTAGE_S = 0.05
"""Pause when the process has no free descriptor for another peer."""


@dataclass(eq=False)
class _PendingPeer:
    """A peer that is still in its handshake."""

    peer: socket.socket
    address: str
    handshake: HandshakeServer
    deadline: float


class AgentListener:
    """Accepts the agents of a run: one connection for each known host, and no other peer.

    One thread serves all peers concurrently. An error of one peer closes that peer only.

    Args:
        port: to listen on.
        key: secret shared by both ends.
        hosts: name in the plan, by the index that a host's agent claims.
        handshake_s: time for each peer's handshake.
    """

    def __init__(self, *, port: int, key: bytes, hosts: Mapping[int, str], handshake_s: float = HANDSHAKE_S) -> None:
        self._key, self._hosts, self._handshake_s = key, hosts, handshake_s
        self._listener = socket.create_server(("", port), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._pending: list[_PendingPeer] = []
        self._connected: dict[int, TcpConnection] = {}
        self._num_rejected = 0
        self._is_shortage_reported = False

    def gather(self, *, timeout_s: float, say: Say) -> dict[str, TcpConnection]:
        """Wait until the agents of all hosts have connected; return their connections by host.

        An agent that connects a second time was restarted: its first connection is closed.

        Raises:
            EnvironmentProblem: some did not connect within ``timeout_s``.
        """
        started = reported = time.monotonic()
        while absent := [name for index, name in self._hosts.items() if index not in self._connected]:
            now = time.monotonic()
            if now - started > timeout_s:
                self.close()
                raise EnvironmentProblem(f"{_shorten_names(absent)} did not connect within {timeout_s:.0f} s")
            if now - reported > _REPORT_EVERY_S:
                reported = now
                refused = f" ({self._num_rejected} connections were rejected)" if self._num_rejected else ""
                say(f"waiting for {_shorten_names(absent)}{refused}")
            self._poll(say)
        self._stop_listening()
        return {self._hosts[index]: connection for index, connection in self._connected.items()}

    def close(self) -> None:
        """Stop listening and close all connections."""
        self._stop_listening()
        for connection in self._connected.values():
            connection.close()

    def _stop_listening(self) -> None:
        for pending in self._pending:
            pending.peer.close()
        self._pending.clear()
        self._selector.close()
        self._listener.close()

    def _poll(self, say: Say) -> None:
        """Wait briefly, serve every peer that has sent data, and close those that have timed out."""
        for key, _ in self._selector.select(_TICK_S):
            if key.data is None:
                self._accept(say)
            elif key.data in self._pending:  # else it was just closed to make room
                self._serve(key.data, say)
        now = time.monotonic()
        for pending in [pending for pending in self._pending if now > pending.deadline]:
            self._reject(pending, f"it did not finish the handshake within {self._handshake_s:g} s", say)

    def _accept(self, say: Say) -> None:
        for _ in range(MAX_PENDING):
            try:
                peer, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as problem:
                if problem.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room(say, shortage=_describe_shortage(problem))
                    time.sleep(_SHORTAGE_S)
                return  # any other is the error of a peer that went while it waited in the queue
            peer.setblocking(False)
            if len(self._pending) >= MAX_PENDING:
                self._make_room(say)
            handshake = HandshakeServer(known=self._hosts, key=self._key)
            pending = _PendingPeer(peer, str(address[0]), handshake, time.monotonic() + self._handshake_s)
            self._pending.append(pending)
            self._selector.register(peer, selectors.EVENT_READ, pending)

    def _make_room(self, say: Say, *, shortage: str = "") -> None:
        """Close the oldest peer of the address with most peers: an agent needs one round trip."""
        if shortage and not self._is_shortage_reported:
            self._is_shortage_reported = True
            say(f"no further connection can be accepted now: {shortage}")
        counts = Counter(pending.address for pending in self._pending)
        if counts:
            address, _ = counts.most_common(1)[0]
            oldest = next(pending for pending in self._pending if pending.address == address)
            self._reject(oldest, shortage or f"{counts[address]} connections from there were open", say)

    def _serve(self, pending: _PendingPeer, say: Say) -> None:
        try:
            answer = pending.handshake.receive(pending.peer.recv(CHUNK_BYTES))
            if answer and pending.peer.send(answer) != len(answer):
                raise HandshakeError("it does not read the answer")
            index = pending.handshake.index
            connection = None if index is None else TcpConnection(self._hosts[index], pending.peer)
        except BlockingIOError:
            return
        except Exception as problem:  # noqa: BLE001  (any error of a peer closes that peer only)
            self._reject(pending, str(problem) or repr(problem), say)
            return
        if index is None or connection is None:
            return
        self._remove(pending)
        previous = self._connected.pop(index, None)
        if previous is not None:
            previous.close()
        self._connected[index] = connection

    def _reject(self, pending: _PendingPeer, reason: str, say: Say) -> None:
        self._remove(pending)
        pending.peer.close()
        self._num_rejected += 1
        if self._num_rejected <= _MAX_REPORTED_REJECTIONS:
            say(f"rejected a connection from {pending.address}: {reason}")
        if self._num_rejected == _MAX_REPORTED_REJECTIONS:
            say("further rejections are counted, not printed")

    def _remove(self, pending: _PendingPeer) -> None:
        self._selector.unregister(pending.peer)
        self._pending.remove(pending)


class TcpConnection(AgentConnection):
    """Messages over a socket; the exit code of the agent is unknown.

    Args:
        host: its name in the plan.
        peer: socket of a completed handshake.
    """

    program = None

    def __init__(self, host: str, peer: socket.socket) -> None:
        self.host = host
        _configure_socket(peer)
        self._peer, self._write_fd = peer, os.dup(peer.fileno())  # a selector registers one descriptor once
        self._reader, self._buffer = MessageReader(FROM_AGENT), WriteBuffer(self._write_fd)
        self.has_hung_up = False
        """The other end closed the connection or died; a host that is cut off stays silent instead."""

    def fileno(self) -> int:
        """Return the socket."""
        return self._peer.fileno()

    def write_fd(self) -> int | None:
        """Return a duplicate of the socket while bytes are queued."""
        return self._write_fd if self._buffer.is_waiting else None

    def receive(self) -> list[AgentMessage] | None:
        """Read what has arrived; call it when ``fileno`` is readable."""
        try:
            data = self._peer.recv(CHUNK_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.has_hung_up = not data
        return self._reader.feed(data)[0] if data else None

    def close(self) -> int:
        """Close the socket."""
        self._buffer.close()
        self._peer.close()
        os.close(self._write_fd)
        return 0


def connect_to_session(address: str, *, port: int, index: int, key: bytes, timeout_s: float, say: Say) -> socket.socket:
    """Return a connection to the session; retry until it listens.

    Args:
        address: of the session; the name need not resolve yet.
        port: of its listener.
        index: of this host.
        key: secret shared by both ends.
        timeout_s: how long to retry.
        say: called with why an attempt failed, once for each reason.

    Raises:
        EnvironmentProblem: all attempts within ``timeout_s`` failed.
    """
    deadline, reported = time.monotonic() + timeout_s, ""
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
                f"the first pod, {address}:{port}, did not accept this agent within {timeout_s:.0f} s: {problem}"
            )
        if problem != reported:
            reported = problem
            say(f"waiting for the first pod, {address}:{port}: {problem}")
        time.sleep(_TICK_S)


def _configure_socket(peer: socket.socket) -> None:
    """Make a socket non-blocking, with TCP_NODELAY and with TCP keepalives."""
    peer.setblocking(False)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)


def _describe_shortage(problem: OSError) -> str:
    if problem.errno != errno.EMFILE:
        return problem.strerror or str(problem)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"this process has no free descriptor (ulimit -n: {soft})"


def _shorten_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
