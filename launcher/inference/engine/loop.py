"""The loop of an engine process, its connection to the server, and their messages.

Messages are JSON behind four bytes of length. Nothing is unpickled.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import (
    EngineOutput,
    EngineRequest,
    EngineStats,
    GeneratedToken,
    InferenceEngine,
    InvalidRequest,
)

LENGTH_PREFIX = struct.Struct("<I")
MAX_MESSAGE_BYTES = 1 << 28
"""A longer frame can only be a mistake."""
WireMessage = dict[str, Any]


def pack_message(message: WireMessage) -> bytes:
    """Return one frame."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    assert len(payload) <= MAX_MESSAGE_BYTES, "bodies are limited long before"
    return LENGTH_PREFIX.pack(len(payload)) + payload


def unpack_message(payload: bytes) -> WireMessage:
    """Return the message of a frame without its length."""
    message: WireMessage = json.loads(payload)
    return message


def request_to_wire(request: EngineRequest) -> WireMessage:
    """Return a request as plain values."""
    return asdict(request)


def request_from_wire(tree: WireMessage) -> EngineRequest:
    """Return the request that ``request_to_wire`` took apart."""
    sampling = dict(tree["sampling"])
    sampling["logit_bias"] = tuple((int(token), float(value)) for token, value in sampling["logit_bias"])
    sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    return EngineRequest(**{**tree, "prompt": tuple(tree["prompt"]), "sampling": SamplingParams(**sampling)})


def output_to_wire(output: EngineOutput) -> list[Any]:
    """Return an output as a short list: there is one for each running request and step."""
    plain = all(token.logprob is None and not token.top for token in output.tokens)
    tokens = [token.id if plain else [token.id, token.logprob, token.top] for token in output.tokens]
    return [output.request_id, tokens, output.finish_reason, output.error, output.param, output.num_cached_tokens]


def output_from_wire(row: list[Any]) -> EngineOutput:
    """Return the output that ``output_to_wire`` took apart."""
    request_id, tokens, finish_reason, error, param, num_cached_tokens = row
    return EngineOutput(
        request_id=request_id,
        tokens=tuple(map(_token, tokens)),
        finish_reason=finish_reason,
        error=error,
        param=param,
        num_cached_tokens=num_cached_tokens,
    )


def stats_to_wire(stats: EngineStats) -> list[Any]:
    """Return the numbers in the order of their fields."""
    return [getattr(stats, field.name) for field in fields(EngineStats)]


def stats_from_wire(row: list[Any]) -> EngineStats:
    """Return the numbers by name again."""
    return EngineStats(**{field.name: value for field, value in zip(fields(EngineStats), row, strict=True)})


def _token(value: Any) -> GeneratedToken:
    if isinstance(value, int):
        return GeneratedToken(id=value)
    number, logprob, top = value
    return GeneratedToken(id=number, logprob=logprob, top=tuple((token, score) for token, score in top))


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

    def send(self, message: WireMessage) -> None:
        """Send one message; blocks while the server does not read.

        Raises:
            ConnectionLost: the server has ended.
        """
        try:
            self._socket.sendall(pack_message(message))
        except OSError as error:
            raise ConnectionLost from error

    def receive(self, *, wait_s: float) -> list[WireMessage]:
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

    def _whole(self) -> list[WireMessage]:
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
            except (ValueError, RecursionError) as error:
                raise ConnectionLost("the server sent a frame that is not JSON") from error
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
    connection.send({"kind": "ready", "max_model_len": engine.max_model_len})
    sent_at = 0.0
    while True:
        idle = engine.idle
        heartbeat("idle" if idle else "step")
        for message in connection.receive(wait_s=_IDLE_S if idle else 0.0):
            if message["kind"] == "shutdown":
                return
            _handle_message(engine, connection, message)
        outputs = engine.step()
        now = time.monotonic()
        if outputs or now - sent_at >= (_IDLE_S if idle else _QUIET_S):
            sent_at = now
            rows = [output_to_wire(output) for output in outputs]
            connection.send({"kind": "step", "outputs": rows, "stats": stats_to_wire(engine.stats())})


def _handle_message(engine: InferenceEngine, connection: EngineConnection, message: WireMessage) -> None:
    match message["kind"]:
        case "add":
            request = request_from_wire(message["request"])
            try:
                engine.add(request)
            except InvalidRequest as invalid:
                connection.send(
                    {"kind": "invalid", "request_id": request.id, "param": invalid.param, "why": str(invalid)}
                )
            except Exception as error:  # noqa: BLE001  (any error: the other requests continue)
                lost = EngineOutput(
                    request_id=request.id, finish_reason="error", error=f"{type(error).__name__}: {error}"
                )
                engine.cancel(request.id)
                connection.send(
                    {"kind": "step", "outputs": [output_to_wire(lost)], "stats": stats_to_wire(engine.stats())}
                )
        case "cancel":
            engine.cancel(message["request_id"])
        case kind:
            raise AssertionError(f"the server sends no {kind}")
