"""Decoding of messages and files of other processes, with every field checked.

A message is one JSON object a line, so that any pipe can carry it. Other output on the pipe (a banner that a login
shell prints) is returned separately.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any, NoReturn

import msgspec

from launcher.protocol.messages import FROM_AGENT, TO_AGENT, AgentMessage

_KINDS = {cls.__struct_config__.tag: cls for cls in TO_AGENT | FROM_AGENT}
_MAX_INT = 2**63
_MAX_CHARS_SHOWN = 80
_MESSAGE_PREFIX = b'{"kind": '
_MAX_LINE_BYTES = 1 << 28
"""An assignment carries the whole plan, every other message is far shorter."""


class MalformedMessage(ValueError):
    """A peer sent data that is not a valid message; the text says why."""


def decode(data: bytes | str, wanted: Any) -> Any:
    """Return the value of a declared type that JSON holds.

    Only whole numbers become ``float`` and lists become tuples; nothing else is converted.

    Args:
        data: the JSON. Its numbers must be finite, and whole ones fit into 64 bits.
        wanted: a ``msgspec.Struct``, a dataclass, or any other type or union that ``msgspec.convert`` takes.

    Raises:
        MalformedMessage: it is not JSON, or of another form.
    """
    return _convert(_parse(data), wanted, name="a malformed message")


def decode_message(
    line: bytes | str, *, accepts: Collection[type[AgentMessage]] = TO_AGENT | FROM_AGENT
) -> AgentMessage:
    """Return the message in a line.

    Args:
        line: a JSON object.
        accepts: the classes of messages that this side may receive.

    Raises:
        MalformedMessage: the line is not such a message.
    """
    tree = _parse(line)
    kind = tree.get("kind") if isinstance(tree, dict) else None
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None or cls not in accepts:
        raise MalformedMessage(f"a message of the kind {_shorten(repr(kind))}, which that side may not send")
    message: AgentMessage = _convert(tree, cls, name=f"a malformed message {kind}")
    return message


def _parse(data: bytes | str) -> Any:
    try:
        return _JSON.decode(data if isinstance(data, str) else data.decode())
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"a line that is not JSON ({_shorten(str(error))}): {_shorten(data)}") from error


def _convert(tree: Any, wanted: Any, *, name: str) -> Any:
    try:
        return msgspec.convert(tree, wanted)
    except msgspec.ValidationError as error:  # names the field and both types; its value could be a secret
        raise MalformedMessage(f"{name}: {_shorten(str(error))}") from error


def _whole_number(text: str) -> int:
    number = int(text)
    if not -_MAX_INT <= number < _MAX_INT:
        raise ValueError("does not fit into 64 bits")
    return number


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("overflows a float")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_int=_whole_number, parse_float=_finite_number, parse_constant=_refuse_constant)
"""Of the standard library: msgspec neither reads nor writes lone surrogates.

Names of files and values of variables may hold them.
"""


def _shorten(line: bytes | str) -> str:
    text = line.decode(errors="replace") if isinstance(line, bytes) else line
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _MAX_CHARS_SHOWN else f"{text[:_MAX_CHARS_SHOWN]}… ({len(line)} characters)"


class MessageReader:
    """Collects bytes and returns the messages that are complete.

    Args:
        accepts: the classes of messages that this side may receive.
    """

    def __init__(self, accepts: Collection[type[AgentMessage]] = TO_AGENT | FROM_AGENT) -> None:
        self._accepts = accepts
        self._partial = bytearray()
        self.malformed = ""
        """Why a line that looked like a message is invalid; the connection must then be closed."""

    def feed(self, data: bytes) -> tuple[list[AgentMessage], bytes]:
        """Return the messages that ``data`` completes, and the lines that are not messages."""
        *ends, rest = data.split(b"\n")
        lines: list[bytes] = []
        for end in ends:
            lines.append(bytes(self._partial + end))
            self._partial.clear()
        self._partial += rest
        messages, noise = [], b""
        for line in lines:
            if not _is_message(line):
                noise += line + b"\n" if line else b""
                continue
            try:
                messages.append(decode_message(line, accepts=self._accepts))
            except MalformedMessage as problem:
                self.malformed = self.malformed or str(problem)
        if len(self._partial) > _MAX_LINE_BYTES:
            self.malformed = self.malformed or f"a line of more than {_MAX_LINE_BYTES >> 20} MiB"
            self._partial.clear()
        return messages, noise


def _is_message(line: bytes) -> bool:
    return line.startswith(_MESSAGE_PREFIX) and line.endswith(b"}")
