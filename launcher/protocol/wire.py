"""Encoding of messages: one checked JSON object a line, so that any pipe can carry it.

Other output on the pipe (a banner that a login shell prints) is returned separately.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from launcher.errors import ConfigError
from launcher.protocol.messages import FROM_AGENT, TO_AGENT, AgentMessage, RankRaised
from launcher.protocol.session_file import ProcessLocation
from launcher.utils.schema import build

_KINDS: dict[str, type[AgentMessage]] = {cls.kind: cls for cls in TO_AGENT | FROM_AGENT}
_MAX_INT = 2**63
_SIGNAL_FIELDS = ("signal",)
_EXIT_CODE_FIELDS = ("code", "exit_code")
_MAX_EXIT_CODE = 255
_MAX_CHARS_SHOWN = 80
_MESSAGE_PREFIX = b'{"kind": '
_MAX_LINE_BYTES = 1 << 28
"""An assignment carries the whole plan, every other message is far shorter."""


class MalformedMessage(ValueError):
    """A peer sent data that is not a valid message; the text says why."""


def decode_message(
    line: bytes | str, *, accepts: Collection[type[AgentMessage]] = TO_AGENT | FROM_AGENT
) -> AgentMessage:
    """Return the message in a line, with every field checked against its declared type.

    Args:
        line: a JSON object.
        accepts: the classes of messages that this side may receive.

    Raises:
        MalformedMessage: the line is not such a message.
    """
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"a line that is not JSON: {_shorten(line)}") from error
    if not isinstance(tree, dict):
        raise MalformedMessage(f"a line that is not an object: {_shorten(line)}")
    kind = tree.pop("kind", None)
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None or cls not in accepts:
        raise MalformedMessage(f"a message of the kind {_shorten(repr(kind))}, which that side may not send")
    fields = _field_checks(cls.kind)
    if wrong := [name for name, check in fields.items() if name in tree and not check(tree[name])]:
        raise MalformedMessage(f"a message {kind} whose {wrong[0]} is {_shorten(repr(tree[wrong[0]]))}")
    try:
        return cls(**tree)
    except TypeError as error:  # a field too many or too few
        raise MalformedMessage(f"a message {kind} with other fields than {', '.join(fields) or 'none'}") from error


def check_message_fields(tree: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that ``tree`` has every field of ``wanted``, each of its type.

    Raises:
        MalformedMessage: a field is missing or has another type.
    """
    for name, hint in wanted.items():
        if name not in tree or not _type_check(hint)(tree[name]):
            raise MalformedMessage(f"a message whose {name} is {_shorten(repr(tree.get(name)))}")


@functools.cache
def _field_checks(kind: str) -> dict[str, Callable[[Any], bool]]:
    """Return the check of each field of a kind of message."""
    cls = _KINDS[kind]
    hints = typing.get_type_hints(cls)
    checks = {field.name: _type_check(hints[field.name]) for field in dataclasses.fields(cls)}
    for name in checks.keys() & set(_SIGNAL_FIELDS):
        checks[name] = functools.partial(_is_signal, optional=hints[name] is not int)
    for name in checks.keys() & set(_EXIT_CODE_FIELDS):
        if hints[name] is not str:  # the code that an agent runs is a folder
            lowest = 1 if cls is RankRaised else 0
            checks[name] = functools.partial(_is_exit_code, lowest=lowest, optional=hints[name] is not int)
    return checks


@functools.cache
def _type_check(hint: Any) -> Callable[[Any], bool]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        choices = [_type_check(choice) for choice in arguments]
        return lambda value: any(choice(value) for choice in choices)
    if origin is list:
        element = _type_check(arguments[0])
        return lambda value: isinstance(value, list) and all(map(element, value))
    if origin is dict:
        item = _type_check(arguments[1])
        return lambda value: isinstance(value, dict) and all(map(item, value.values()))
    if hint is Any:
        return lambda value: True
    if hint is float:
        return lambda value: (type(value) is float and math.isfinite(value)) or _is_int(value)
    return _is_int if hint is int else lambda value: type(value) is hint


def _is_int(value: Any) -> bool:
    return type(value) is int and -_MAX_INT <= value < _MAX_INT


def _is_signal(value: Any, *, optional: bool) -> bool:
    return (value is None and optional) or (_is_int(value) and 0 < value < signal.NSIG)


def _is_exit_code(value: Any, *, lowest: int, optional: bool) -> bool:
    return (value is None and optional) or (_is_int(value) and lowest <= value <= _MAX_EXIT_CODE)


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


def process_location_from_tree(tree: dict[str, Any]) -> ProcessLocation:
    """Return the location that an agent sent.

    Raises:
        MalformedMessage: ``tree`` is not a location.
    """
    mistakes: list[ConfigError] = []
    location = build(ProcessLocation, tree, path="location", report=mistakes.append)
    if location is None:
        raise MalformedMessage(f"a malformed location of a process: {mistakes[0]}")
    return location
