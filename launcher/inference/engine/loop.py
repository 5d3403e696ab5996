"""The loop of an engine process, its connection to the server, and their messages.

Messages are MessagePack behind four bytes of length. Nothing is unpickled.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from launcher.inference.engine.base import (
    EngineOutput,
    EngineRequest,
    EngineStats,
    InferenceEngine,
    InvalidRequest,
)
from launcher.utils.text import printable

LENGTH_PREFIX = struct.Struct("<I")
MAX_MESSAGE_BYTES = 1 << 28
"""A longer frame can only be a mistake."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """Base of all messages."""


class AddRequest(_Message, frozen=True, kw_only=True, tag="add"):
    """To an engine: continue one sequence."""

    request: EngineRequest


class CancelRequest(_Message, frozen=True, kw_only=True, tag="cancel"):
    """To an engine: drop a request before its next step."""

    request_id: str


class Shutdown(_Message, frozen=True, tag="shutdown"):
    """To an engine: end."""


class BuildPhase(_Message, frozen=True, kw_only=True, tag="heartbeat"):
    """From an engine that is being built."""

    phase: str


class BuildFailed(_Message, frozen=True, kw_only=True, tag="failed"):
    """From an engine: it cannot be built."""

    why: str
    code: int
    """Its exit code."""


class EngineReady(_Message, frozen=True, kw_only=True, tag="ready"):
    """From an engine that takes requests."""

    max_model_len: int


class StepOutputs(_Message, frozen=True, kw_only=True, tag="step"):
    """From an engine: what a step has made, or nothing for a while."""

    outputs: Sequence[EngineOutput]
    stats: EngineStats


class RequestRefused(_Message, frozen=True, kw_only=True, tag="invalid"):
    """From an engine: a request that it cannot serve."""

    request_id: str
    param: str
    why: str


EngineMessage = (
    AddRequest | CancelRequest | Shutdown | BuildPhase | BuildFailed | EngineReady | StepOutputs | RequestRefused
)
_DECODER: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)


def pack_message(message: EngineMessage) -> bytes:
    """Return one frame."""
    payload = msgspec.msgpack.encode(message)
    assert len(payload) <= MAX_MESSAGE_BYTES, "bodies are limited long before"
    return LENGTH_PREFIX.pack(len(payload)) + payload


def unpack_message(payload: bytes) -> EngineMessage:
    """Return the message of a frame without its length.

    Raises:
        msgspec.MsgspecError: it holds no such message.
    """
    return _DECODER.decode(payload)


_RECEIVE_BYTES = 1 << 18


class ConnectionLost(Exception):
    """The other process closed the connection."""


class EngineConnection:
    """Sends at once, and receives available messages.

    Args:
        connection: one half of a socket pair.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._buffer = connection, bytearray()

    def send(self, message: EngineMessage) -> None:
        """Send one message; blocks while the server does not read.

        Raises:
            ConnectionLost: the server has ended.
        """
        try:
            self._socket.sendall(pack_message(message))
        except OSError as error:
            raise ConnectionLost from error

    def receive(self, *, wait_s: float) -> list[EngineMessage]:
        """Return the messages that are there, waiting at most ``wait_s`` for the first.

        Raises:
            ConnectionLost: the server has ended.
        """
        found = self._whole()
        ready, _, _ = select.select([self._socket], [], [], 0.0 if found else wait_s)
        while ready:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise ConnectionLost from error
            if not data:
                raise ConnectionLost
            self._buffer += data
            ready, _, _ = select.select([self._socket], [], [], 0.0)
        return found + self._whole()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _whole(self) -> list[EngineMessage]:
        """Take the whole frames out of the buffer."""
        messages, at = [], 0
        while len(self._buffer) - at >= LENGTH_PREFIX.size:
            (length,) = LENGTH_PREFIX.unpack_from(self._buffer, at)
            if length > MAX_MESSAGE_BYTES:
                raise ConnectionLost(f"the server sent a frame of {length} bytes")
            end = at + LENGTH_PREFIX.size + length
            if len(self._buffer) < end:
                break
            try:
                messages.append(unpack_message(bytes(self._buffer[at + LENGTH_PREFIX.size : end])))
            except (msgspec.MsgspecError, RecursionError) as error:
                raise ConnectionLost(f"the server sent a malformed message: {error}") from error
            at = end
        del self._buffer[:at]
        return messages


_IDLE_S = 0.5
"""Longest time between two messages to the server without work."""
_QUIET_S = 0.1
"""The same between steps without output."""


def run_engine_loop(engine: InferenceEngine, connection: EngineConnection, *, heartbeat: Callable[[str], None]) -> None:
    """Serve requests until the ``shutdown`` message.

    Args:
        engine: warmed up.
        connection: to the server.
        heartbeat: called at every turn.

    Raises:
        ConnectionLost: the server ended without a shutdown message.
    """
    connection.send(EngineReady(max_model_len=engine.max_model_len))
    sent_at = 0.0
    while True:
        idle = engine.idle
        heartbeat("idle" if idle else "step")
        for message in connection.receive(wait_s=_IDLE_S if idle else 0.0):
            if isinstance(message, Shutdown):
                return
            _handle_message(engine, connection, message)
        outputs = engine.step()
        now = time.monotonic()
        if outputs or now - sent_at >= (_IDLE_S if idle else _QUIET_S):
            sent_at = now
            connection.send(StepOutputs(outputs=_with_printable_errors(outputs), stats=engine.stats()))


def _with_printable_errors(outputs: Sequence[EngineOutput]) -> list[EngineOutput]:
    """Return outputs that can be encoded: the text of an error may hold lone surrogates."""
    return [replace(output, error=printable(output.error)) if output.error else output for output in outputs]


def _handle_message(engine: InferenceEngine, connection: EngineConnection, message: EngineMessage) -> None:
    match message:
        case AddRequest(request=request):
            try:
                engine.add(request)
            except InvalidRequest as invalid:
                why = printable(str(invalid))
                connection.send(RequestRefused(request_id=request.id, param=invalid.param, why=why))
            except Exception as error:  # noqa: BLE001  (any error: the other requests continue)
                engine.cancel(request.id)
                why = f"{type(error).__name__}: {error}"
                lost = EngineOutput(request_id=request.id, finish_reason="error", error=why)
                connection.send(StepOutputs(outputs=_with_printable_errors([lost]), stats=engine.stats()))
        case CancelRequest():
            engine.cancel(message.request_id)
        case _:
            raise AssertionError(f"the server sends no {message}")
