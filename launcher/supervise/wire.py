"""Bytes of a connection to messages. What is not a message (a banner that a login shell prints) is kept apart."""

from __future__ import annotations

from launcher.supervise.messages import Message, decode

_BEGINNING = b'{"kind": '


class Inbox:
    """Collects bytes and gives out the messages that are complete."""

    def __init__(self) -> None:
        self._partial = b""

    def take(self, data: bytes) -> tuple[list[Message], bytes]:
        """Return the messages that ``data`` completes, and the lines that are none."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        messages = [decode(line) for line in lines if _is_message(line)]
        noise = b"".join(line + b"\n" for line in lines if line and not _is_message(line))
        return messages, noise


def _is_message(line: bytes) -> bool:
    return line.startswith(_BEGINNING) and line.endswith(b"}")
