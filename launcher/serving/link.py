"""The engine's end of its connection to the front: frames over a socket that one thread reads and writes."""

from __future__ import annotations

import select
import socket

from launcher.serving.frames import LENGTH, MAX_BYTES, Message, pack, unpack

_CHUNK = 1 << 18


class Gone(Exception):
    """The other end is not there any more."""


class EngineLink:
    """Sends at once and receives what is there.

    Args:
        connection: one half of a socket pair.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._buffer = connection, bytearray()

    def send(self, message: Message) -> None:
        """Send one message; waits while the front does not read.

        Raises:
            Gone: the front has ended.
        """
        try:
            self._socket.sendall(pack(message))
        except OSError as error:
            raise Gone from error

    def receive(self, *, wait_s: float) -> list[Message]:
        """Return the messages that are there, waiting at most ``wait_s`` for the first.

        Raises:
            Gone: the front has ended.
        """
        found = self._whole()
        ready, _, _ = select.select([self._socket], [], [], 0.0 if found else wait_s)
        while ready:
            try:
                data = self._socket.recv(_CHUNK)
            except OSError as error:
                raise Gone from error
            if not data:
                raise Gone
            self._buffer += data
            ready, _, _ = select.select([self._socket], [], [], 0.0)
        return found + self._whole()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _whole(self) -> list[Message]:
        """Take the whole frames out of the buffer."""
        messages, at = [], 0
        while len(self._buffer) - at >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer, at)
            if length > MAX_BYTES:
                raise Gone(f"the front sent a frame of {length} bytes")
            end = at + LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                messages.append(unpack(bytes(self._buffer[at + LENGTH.size : end])))
            except (ValueError, RecursionError) as error:
                raise Gone("the front sent a frame that is not JSON") from error
            at = end
        del self._buffer[:at]
        return messages
