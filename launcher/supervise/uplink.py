"""The agent's side of the pipe to the session: never blocks, and notices when the session is gone."""

from __future__ import annotations

import os
import select

from launcher.supervise.messages import Message, decode

_CHUNK = 1 << 16
_FULL = 1 << 22


class Uplink:
    """Messages in on one descriptor, out on another."""

    def __init__(self, *, inbox: int, outbox: int) -> None:
        self.inbox, self.outbox = inbox, outbox
        self.lost = False
        """The session is gone: nothing will be read or answered any more."""
        self._incoming, self._outgoing = b"", bytearray()
        os.set_blocking(inbox, False)
        os.set_blocking(outbox, False)

    @property
    def is_full(self) -> bool:
        """Whether the session reads more slowly than we write; logs can wait in their files meanwhile."""
        return len(self._outgoing) > _FULL and not self.lost

    def first(self) -> Message:
        """Wait for the first message.

        Raises:
            EOFError: the session went before it sent one.
        """
        while not self.lost:
            select.select([self.inbox], [], [])
            if messages := self.receive():
                assert len(messages) == 1, "orders follow once the agent is ready"
                return messages[0]
        raise EOFError("the session is gone")

    def receive(self) -> list[Message]:
        """Return the messages that have arrived whole."""
        try:
            data = os.read(self.inbox, _CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.lost = True
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        return [decode(line) for line in lines]

    def send(self, message: Message) -> None:
        """Queue a message and write what fits."""
        if not self.lost:
            self._outgoing += message.encode()
            self.flush()

    def flush(self) -> None:
        """Write what the pipe takes."""
        while self._outgoing and not self.lost:
            try:
                written = os.write(self.outbox, self._outgoing[:_CHUNK])
            except BlockingIOError:
                return
            except OSError:
                self.lost = True
                return
            del self._outgoing[:written]

    def flush_all(self) -> None:
        """Write everything, however slowly it is read, unless the session goes."""
        while self._outgoing and not self.lost:
            readable, _, _ = select.select([self.inbox], [self.outbox], [], 1.0)
            if readable and not os.read(self.inbox, _CHUNK):
                self.lost = True
            self.flush()
