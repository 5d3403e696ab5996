"""The agent's side of the connection to the session: never blocks, and notices when the session is gone."""

from __future__ import annotations

import math
import os
import select
import sys
import threading
import time

from launcher.supervise.messages import TO_AGENT, Assignment, Hold, Message, Ping
from launcher.supervise.pulse import Pulse
from launcher.supervise.wire import Inbox

_CHUNK = 1 << 16
_FULL = 1 << 22


class Uplink:
    """Messages in on one descriptor, out on another.

    Args:
        inbox: where orders come from.
        outbox: where events go; may be the same socket.
    """

    def __init__(self, *, inbox: int, outbox: int) -> None:
        self.inbox, self.outbox = inbox, outbox
        self.lost = False
        """The session is gone: nothing will be read or answered any more."""
        self._incoming, self._outgoing = Inbox(TO_AGENT), bytearray()
        self._waiting: list[Message] = []
        self._lock = threading.Lock()
        self._timeout_s = math.inf
        self._heard_at = math.inf
        self._pulse = Pulse(lambda: self.send(Ping()))
        os.set_blocking(inbox, False)
        os.set_blocking(outbox, False)

    @property
    def is_full(self) -> bool:
        """Whether the session reads more slowly than we write; logs can wait in their files meanwhile."""
        return len(self._outgoing) > _FULL and not self.lost

    @property
    def waiting_bytes(self) -> int:
        """How much has been queued and not been taken by the connection."""
        return len(self._outgoing)

    def first(self) -> Assignment:
        """Wait for the first message, which says what to do.

        Raises:
            EOFError: the session went before it sent one.
        """
        while not self._waiting and not self.lost:
            select.select([self.inbox], [], [])
            self._waiting += self._read()
        if not self._waiting:
            raise EOFError("the session is gone")
        first = self._waiting.pop(0)
        if not isinstance(first, Assignment):
            self._break_off(f"a message {first.kind} before the assignment")
            raise EOFError("the session sent no assignment")  # noqa: TRY004 (it is the same as no message)
        return first

    def keep_alive(self, timeout_s: float) -> None:
        """Say every second that we are there, and count the session as gone after ``timeout_s`` of silence."""
        if timeout_s:
            self._timeout_s, self._heard_at = timeout_s, time.monotonic()
            self._pulse.start()

    def receive(self) -> list[Message]:
        """Return the orders that have arrived whole, and look whether the session is still there."""
        arrived, self._waiting = self._waiting + self._read(), []
        if arrived and self._timeout_s < math.inf:
            is_held = isinstance(arrived[-1], Hold)
            self._heard_at = math.inf if is_held else time.monotonic()
        if any(isinstance(order, Assignment) for order in arrived):
            self._break_off("a second assignment")
        return [order for order in arrived if not isinstance(order, Ping | Hold | Assignment)]

    def check(self) -> None:
        """Notice a session that has been silent for too long."""
        if time.monotonic() - self._heard_at > self._timeout_s:
            self.lost = True

    def send(self, message: Message) -> None:
        """Queue a message and write what fits."""
        with self._lock:
            if not self.lost:
                self._outgoing += message.encode()
                self._flush()

    def flush(self) -> None:
        """Write what the connection takes."""
        with self._lock:
            self._flush()

    def flush_all(self) -> None:
        """Write everything, however slowly it is read, unless the session goes; it is the last thing we do."""
        self._pulse.stop()
        while self._outgoing and not self.lost:
            readable, _, _ = select.select([self.inbox], [self.outbox], [], 1.0)
            if readable:
                self.receive()
            self.check()
            self.flush()

    def _read(self) -> list[Message]:
        try:
            data = os.read(self.inbox, _CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.lost = True
        messages, noise = self._incoming.take(data)
        if noise:
            sys.stderr.buffer.write(b"not an order: " + noise)
        if self._incoming.malformed and not self.lost:
            self._break_off(self._incoming.malformed)
        return messages

    def _break_off(self, why: str) -> None:
        """Take the session for lost: it sent what no session sends, so what it means cannot be known."""
        self.lost = True
        print(f"the connection to the session is closed: it sent {why}", file=sys.stderr, flush=True)

    def _flush(self) -> None:
        while self._outgoing and not self.lost:
            try:
                written = os.write(self.outbox, self._outgoing[:_CHUNK])
            except BlockingIOError:
                return
            except OSError:
                self.lost = True
                return
            del self._outgoing[:written]
