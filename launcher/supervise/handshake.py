"""Two ends of a network connection prove to each other that they belong to the same run, without showing the key.

    pod   → gate   index, nonce
    gate  → pod    nonce, HMAC(key, "gate", index, both nonces)
    pod   → gate          HMAC(key, "pod",  index, both nonces)
    gate  → pod    welcome

Each line is JSON. What follows is as private as the network that carries it: it is neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
from collections.abc import Container
from typing import Any

_LINE_BYTES = 1024
_NONCE_BYTES = 32


class HandshakeError(Exception):
    """The other end is not what it should be; the message says what it is instead."""


def knock(peer: socket.socket, *, index: int, key: bytes) -> None:
    """Prove to the gate that we are pod ``index``, and have it prove itself.

    Raises:
        HandshakeError: it does not know the key, or wants none of us.
        OSError: the connection broke, or nothing came within its timeout.
    """
    ours = secrets.token_hex(_NONCE_BYTES)
    _send(peer, {"index": index, "nonce": ours})
    answer = _receive(peer, nonce=str, proof=str)
    theirs = answer["nonce"]
    if not hmac.compare_digest(answer["proof"].encode(), _proof(key, "gate", index, ours, theirs)):
        raise HandshakeError("it does not know the key of this run")
    _send(peer, {"proof": _proof(key, "pod", index, ours, theirs).decode()})
    _receive(peer, welcome=bool)


def admit(peer: socket.socket, *, known: Container[int], key: bytes) -> int:
    """Have whoever knocks prove that it is one of the pods ``known``, and return which.

    Raises:
        HandshakeError: it is none of them.
        OSError: the connection broke, or nothing came within its timeout.
    """
    asked = _receive(peer, index=int, nonce=str)
    index, theirs, ours = asked["index"], asked["nonce"], secrets.token_hex(_NONCE_BYTES)
    if index not in known:
        raise HandshakeError(f"it calls itself pod {index}, and there is none")
    _send(peer, {"nonce": ours, "proof": _proof(key, "gate", index, theirs, ours).decode()})
    answer = _receive(peer, proof=str)
    if not hmac.compare_digest(answer["proof"].encode(), _proof(key, "pod", index, theirs, ours)):
        raise HandshakeError(f"it calls itself pod {index} and does not know the key of this run")
    _send(peer, {"welcome": True})
    return int(index)


def _proof(key: bytes, role: str, index: int, pod_nonce: str, gate_nonce: str) -> bytes:
    said = json.dumps([role, index, pod_nonce, gate_nonce]).encode()
    return hmac.new(key, said, hashlib.sha256).hexdigest().encode()


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer: socket.socket, **wanted: type) -> dict[str, Any]:
    """Read one line and no byte more: what follows belongs to others."""
    line = b""
    while not line.endswith(b"\n"):
        byte = peer.recv(1)
        if not byte:
            raise HandshakeError("it hung up")
        line += byte
        if len(line) > _LINE_BYTES:
            raise HandshakeError("it speaks another language")
    try:
        message = json.loads(line)
    except ValueError as error:
        raise HandshakeError("it speaks another language") from error
    if not isinstance(message, dict) or any(type(message.get(name)) is not kind for name, kind in wanted.items()):
        raise HandshakeError("it speaks another language")
    return message
