"""Handshake of a TCP connection: both ends prove that they know the key of the run.

    agent    → session  index, nonce
    session  → agent    nonce, HMAC(key, "gate", index, both nonces)
    agent    → session         HMAC(key, "pod",  index, both nonces)
    session  → agent    welcome

Each line is JSON. What follows is as private as the network that carries it: it is neither encrypted nor signed.
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
"""Time for a whole handshake, however many pieces its lines arrive in."""

_LINE_BYTES = 1024
_NONCE_BYTES = 32
_HEX = re.compile(r"[0-9a-f]{64}")
"""What nonces and proofs look like: both are 32 bytes."""


class HandshakeError(Exception):
    """The other end is not what it should be; the message says what it is instead."""


def authenticate(peer: socket.socket, *, index: int, key: bytes, timeout_s: float = HANDSHAKE_S) -> None:
    """Prove to the gate that we are pod ``index``, and have it prove itself.

    Raises:
        HandshakeError: it does not know the key, refuses us, or did not answer within ``timeout_s``.
        OSError: the connection broke.
    """
    deadline = time.monotonic() + timeout_s
    ours = secrets.token_hex(_NONCE_BYTES)
    _send(peer, _line(index=index, nonce=ours), deadline)
    answer = _receive(peer, deadline, nonce=str, proof=str)
    theirs = answer["nonce"]
    if not hmac.compare_digest(answer["proof"].encode(), _proof(key, "gate", index, ours, theirs)):
        raise HandshakeError("it does not know the key of this run")
    _send(peer, _line(proof=_proof(key, "pod", index, ours, theirs).decode()), deadline)
    _receive(peer, deadline, welcome=bool)


class HandshakeServer:
    """The gate's side of one handshake: bytes in, bytes out. It never waits, so one thread serves many peers.

    Args:
        known: indices of the pods that may come.
        key: that both ends know.
    """

    def __init__(self, *, known: Container[int], key: bytes) -> None:
        self._known, self._key = known, key
        self._received = b""
        self._ours = secrets.token_hex(_NONCE_BYTES)
        self._claim: tuple[int, str] | None = None
        self.index: int | None = None
        """Of the pod, once it has proved that it is one."""

    def take(self, data: bytes) -> bytes:
        """Return what to answer to ``data``; ``index`` is set after the last line.

        Raises:
            HandshakeError: the peer is none of the pods.
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
        asked = _parse(line, index=int, nonce=str)
        index, theirs = asked["index"], asked["nonce"]
        if index not in self._known:
            raise HandshakeError(f"it calls itself pod {index}, and there is none")
        self._claim = index, theirs
        return _line(nonce=self._ours, proof=_proof(self._key, "gate", index, theirs, self._ours).decode())

    def _welcome(self, line: bytes, index: int, theirs: str) -> bytes:
        answer = _parse(line, proof=str)
        if not hmac.compare_digest(answer["proof"].encode(), _proof(self._key, "pod", index, theirs, self._ours)):
            raise HandshakeError(f"it calls itself pod {index} and does not know the key of this run")
        self.index = index
        return _line(welcome=True)


def _proof(key: bytes, role: str, index: int, pod_nonce: str, gate_nonce: str) -> bytes:
    said = json.dumps([role, index, pod_nonce, gate_nonce]).encode()
    return hmac.new(key, said, hashlib.sha256).hexdigest().encode()


def _line(**message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _send(peer: socket.socket, line: bytes, deadline: float) -> None:
    peer.settimeout(_left(deadline))
    try:
        peer.sendall(line)
    except TimeoutError as error:
        raise HandshakeError("it did not finish the handshake in time") from error


def _receive(peer: socket.socket, deadline: float, **wanted: type) -> dict[str, Any]:
    """Read one line and no byte more: what follows belongs to others."""
    line = b""
    while not line.endswith(b"\n"):
        peer.settimeout(_left(deadline))
        try:
            byte = peer.recv(1)
        except TimeoutError as error:
            raise HandshakeError("it did not finish the handshake in time") from error
        if not byte:
            raise HandshakeError("it closed the connection")
        line += byte
        if len(line) > _LINE_BYTES:
            raise HandshakeError(f"its line is longer than {_LINE_BYTES} bytes")
    return _parse(line, **wanted)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise HandshakeError("it did not finish the handshake in time")
    return left


def _parse(line: bytes, **wanted: type) -> dict[str, Any]:
    """Return the message that a line holds: exactly the fields ``wanted``, each once and of its type.

    Raises:
        HandshakeError: the line holds anything else.
    """
    try:
        pairs = json.loads(line.decode("utf-8"), object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise HandshakeError("it sent a line that is not JSON") from error
    names = [pair[0] for pair in pairs if isinstance(pair, tuple)] if isinstance(pairs, list) else []
    if sorted(names) != sorted(wanted) or len(names) != len(pairs):
        raise HandshakeError(f"it sent a line without the fields {', '.join(wanted)}")
    message: dict[str, Any] = dict(pairs)
    for name, kind in wanted.items():
        value = message[name]
        if type(value) is not kind or (isinstance(value, str) and not _HEX.fullmatch(value)):
            raise HandshakeError(f"it sent a {name} of the wrong form")
    return message
