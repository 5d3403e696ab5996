"""Handshake of a TCP connection: both ends prove that they know the key of the run.

    agent    → session  index, nonce
    session  → agent    nonce, HMAC(key, "session", index, both nonces)
    agent    → session         HMAC(key, "agent", index, both nonces)
    session  → agent    welcome

Each line is JSON. The messages that follow are neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import socket
import time
from collections.abc import Container
from typing import Any

HANDSHAKE_S = 5.0
"""Time for a whole handshake."""

_LINE_BYTES = 1024
_NONCE_BYTES = 32
_HEX = re.compile(r"[0-9a-f]{64}")
"""Form of nonces and proofs: both are 32 bytes."""


class HandshakeError(Exception):
    """The other end failed the handshake; the message says why."""


def authenticate(peer: socket.socket, *, index: int, key: bytes, timeout_s: float = HANDSHAKE_S) -> None:
    """Prove to the session that this is the agent ``index``, and check the session's own proof.

    Raises:
        HandshakeError: it does not know the key, refuses this agent, or did not answer within ``timeout_s``.
        OSError: the connection broke.
    """
    deadline = time.monotonic() + timeout_s
    agent_nonce = secrets.token_hex(_NONCE_BYTES)
    _send(peer, _line(index=index, nonce=agent_nonce), deadline)
    answer = _receive(peer, deadline, nonce=str, proof=str)
    session_nonce = answer["nonce"]
    if not hmac.compare_digest(answer["proof"].encode(), _proof(key, "session", index, agent_nonce, session_nonce)):
        raise HandshakeError("it does not have the key of this run")
    _send(peer, _line(proof=_proof(key, "agent", index, agent_nonce, session_nonce).decode()), deadline)
    _receive(peer, deadline, welcome=bool)


class HandshakeServer:
    """The session's side of one handshake, without I/O, so that one thread serves many peers.

    Args:
        known: indices of the agents that may connect.
        key: that both ends know.
    """

    def __init__(self, *, known: Container[int], key: bytes) -> None:
        self._known, self._key = known, key
        self._received = b""
        self._nonce = secrets.token_hex(_NONCE_BYTES)
        self._claim: tuple[int, str] | None = None  # index and nonce of the agent
        self.index: int | None = None
        """Index of the agent, once it has proved that it knows the key."""

    def receive(self, data: bytes) -> bytes:
        """Return the answer to ``data``; ``index`` is set after the last line.

        Raises:
            HandshakeError: the peer is not an agent of this run.
        """
        if not data:
            raise HandshakeError("it closed the connection")
        self._received += data
        line, newline, rest = self._received.partition(b"\n")
        if len(line) > _LINE_BYTES:
            raise HandshakeError(f"its line is longer than {_LINE_BYTES} bytes")
        if not newline:
            return b""
        if rest:  # each side waits for the other's line
            raise HandshakeError("it sent more than one line at a time")
        self._received = b""
        return self._answer(line) if self._claim is None else self._welcome(line, *self._claim)

    def _answer(self, line: bytes) -> bytes:
        claim = _parse(line, index=int, nonce=str)
        index, agent_nonce = claim["index"], claim["nonce"]
        if index not in self._known:
            raise HandshakeError(f"it claims the unknown index {index}")
        self._claim = index, agent_nonce
        proof = _proof(self._key, "session", index, agent_nonce, self._nonce)
        return _line(nonce=self._nonce, proof=proof.decode())

    def _welcome(self, line: bytes, index: int, agent_nonce: str) -> bytes:
        answer = _parse(line, proof=str)
        if not hmac.compare_digest(
            answer["proof"].encode(), _proof(self._key, "agent", index, agent_nonce, self._nonce)
        ):
            raise HandshakeError(f"it claims index {index} and does not have the key of this run")
        self.index = index
        return _line(welcome=True)


def _proof(key: bytes, role: str, index: int, agent_nonce: str, session_nonce: str) -> bytes:
    message = json.dumps([role, index, agent_nonce, session_nonce]).encode()
    return hmac.new(key, message, hashlib.sha256).hexdigest().encode()


def _line(**message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _send(peer: socket.socket, line: bytes, deadline: float) -> None:
    peer.settimeout(_remaining_s(deadline))
    try:
        peer.sendall(line)
    except TimeoutError as error:
        raise HandshakeError("it did not finish the handshake in time") from error


def _receive(peer: socket.socket, deadline: float, **fields: type) -> dict[str, Any]:
    """Read one line and no byte more: messages follow."""
    line = b""
    while not line.endswith(b"\n"):
        peer.settimeout(_remaining_s(deadline))
        try:
            byte = peer.recv(1)
        except TimeoutError as error:
            raise HandshakeError("it did not finish the handshake in time") from error
        if not byte:
            raise HandshakeError("it closed the connection")
        line += byte
        if len(line) > _LINE_BYTES:
            raise HandshakeError(f"its line is longer than {_LINE_BYTES} bytes")
    return _parse(line, **fields)


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise HandshakeError("it did not finish the handshake in time")
    return remaining_s


def _parse(line: bytes, **fields: type) -> dict[str, Any]:
    """Return the message in a line: exactly ``fields``, each once and of its type.

    Raises:
        HandshakeError: the line has another form.
    """
    try:
        pairs = json.loads(line.decode("utf-8"), object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise HandshakeError("it sent a line that is not JSON") from error
    names = [pair[0] for pair in pairs if isinstance(pair, tuple)] if isinstance(pairs, list) else []
    if sorted(names) != sorted(fields) or len(names) != len(pairs):
        raise HandshakeError(f"it sent a line without the fields {', '.join(fields)}")
    message: dict[str, Any] = dict(pairs)
    for name, kind in fields.items():
        value = message[name]
        if type(value) is not kind or (isinstance(value, str) and not _HEX.fullmatch(value)):
            raise HandshakeError(f"it sent a {name} of the wrong form")
    return message
