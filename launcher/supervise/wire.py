"""Bytes of a connection to messages. What is not a message (a banner that a login shell prints) is kept apart."""

from __future__ import annotations

from collections.abc import Collection

from launcher.supervise.messages import FROM_AGENT, TO_AGENT, MalformedMessage, Message, decode

_BEGINNING = b'{"kind": '
_LONGEST_BYTES = 1 << 28
"""Of one line; an assignment carries the whole plan, every other message is far shorter."""


class Inbox:
    """Collects bytes and gives out the messages that are complete.

    Args:
        accepts: the classes of messages that may arrive here.
    """

    def __init__(self, accepts: Collection[type[Message]] = TO_AGENT | FROM_AGENT) -> None:
        self._accepts = accepts
        self._partial = bytearray()
        self.malformed = ""
        """What the peer sent that only looked like a message: it cannot be trusted with another one."""

    def take(self, data: bytes) -> tuple[list[Message], bytes]:
        """Return the messages that ``data`` completes, and the lines that are none."""
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
                messages.append(decode(line, accepts=self._accepts))
            except MalformedMessage as problem:
                self.malformed = self.malformed or str(problem)
        if len(self._partial) > _LONGEST_BYTES:
            self.malformed = self.malformed or f"a line of more than {_LONGEST_BYTES >> 20} MiB"
            self._partial.clear()
        return messages, noise


def _is_message(line: bytes) -> bool:
    return line.startswith(_BEGINNING) and line.endswith(b"}")
