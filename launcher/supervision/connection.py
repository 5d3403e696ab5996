"""Connections between the session and host agents over pipes, with keepalives."""

from __future__ import annotations

import math
import os
import select
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from launcher.protocol.messages import FROM_AGENT, TO_AGENT, AgentMessage, Assignment, Ping, SessionSuspended
from launcher.protocol.wire import MessageReader
from launcher.remote.command import RemoteCommand
from launcher.utils.files import open_append
from launcher.utils.logs import open_log
from launcher.utils.system import child_environment

CHUNK_BYTES = 1 << 16
KEEPALIVE_S = 1.0
_FULL_BYTES = 1 << 22


class WriteBuffer:
    """Queue of bytes for a non-blocking descriptor; any thread may write to it.

    Args:
        descriptor: to write to; it stays the caller's to close, after ``close``.
        content: bytes that are sent first.
    """

    def __init__(self, descriptor: int, *, content: bytes = b"") -> None:
        self._descriptor, self._queue = descriptor, bytearray(content)
        self._lock = threading.Lock()
        self.is_closed = False
        """It was closed, or the other end is gone: nothing is written any more."""

    @property
    def num_bytes(self) -> int:
        """How much is queued."""
        return len(self._queue)

    @property
    def is_waiting(self) -> bool:
        """Whether bytes wait until the descriptor is writable."""
        return bool(self._queue) and not self.is_closed

    def write(self, data: bytes) -> None:
        """Queue ``data`` and write what the descriptor takes."""
        with self._lock:
            if not self.is_closed:
                self._queue += data
                self._flush()

    def flush(self) -> None:
        """Write as much as the descriptor takes."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Stop writing; when this returns, no other thread uses the descriptor."""
        with self._lock:
            self.is_closed = True

    def _flush(self) -> None:
        while self._queue and not self.is_closed:
            try:
                written = os.write(self._descriptor, self._queue[:CHUNK_BYTES])
            except BlockingIOError:
                return
            except OSError:
                self.is_closed = True
                return
            del self._queue[:written]


class AgentConnection(ABC):
    """Messages to and from one host's agent; backends differ in how they open it.

    ``send`` may be called from a second thread.
    """

    host: str
    """Name of the host in the plan."""
    program: str | None
    """Program that carries the messages (``ssh``); ``None`` for a bare socket.
    ``close`` returns its exit code."""
    _reader: MessageReader
    _buffer: WriteBuffer

    @property
    def malformed(self) -> str:
        """Description of invalid data from the agent; empty if all was valid."""
        return self._reader.malformed

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor that is readable when there are messages."""

    @abstractmethod
    def write_fd(self) -> int | None:
        """Return the descriptor to wait for until it is writable; ``None`` when nothing is queued."""

    def send(self, message: AgentMessage) -> None:
        """Queue one message and write what fits; ``receive`` reports an agent that is gone."""
        self._buffer.write(message.encode())

    def flush(self) -> None:
        """Write as much of the queue as fits."""
        self._buffer.flush()

    @abstractmethod
    def receive(self) -> list[AgentMessage] | None:
        """Return the messages that have arrived; ``None`` once the agent is gone."""

    @abstractmethod
    def close(self) -> int:
        """Close the connection; return the exit code of ``program``, negative for a signal."""


class PipeConnection(AgentConnection):
    """Messages over stdin and stdout of a child of this process: the agent itself, ssh or srun.

    Args:
        host: its name in the plan.
        remote: command to start, in a session of its own, so that Ctrl-C in the terminal signals the caller only.
        log: file that receives the command's stderr.
    """

    def __init__(self, host: str, remote: RemoteCommand, *, log: Path) -> None:
        self.host, self.program = host, Path(remote.argv[0]).name
        with open_log(log) as errors:
            self._popen = subprocess.Popen(
                remote.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**child_environment(), **remote.env},
                start_new_session=True,
                bufsize=0,
            )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
        os.set_blocking(self._stdin.fileno(), False)
        self._reader, self._log = MessageReader(FROM_AGENT), log
        self._buffer = WriteBuffer(self._stdin.fileno(), content=remote.prologue)

    def fileno(self) -> int:
        """Return the command's stdout."""
        return self._stdout.fileno()

    def write_fd(self) -> int | None:
        """Return the command's stdin while bytes are queued."""
        return self._stdin.fileno() if self._buffer.is_waiting else None

    def receive(self) -> list[AgentMessage] | None:
        """Read what has arrived; call it when ``fileno`` is readable."""
        data = os.read(self._stdout.fileno(), CHUNK_BYTES)
        if not data:
            return None
        messages, noise = self._reader.feed(data)
        if noise:
            with open_append(self._log) as log:
                log.write(noise)
        return messages

    def close(self) -> int:
        """Kill the command if it still runs."""
        self._popen.kill()
        code = self._popen.wait()
        self._buffer.close()
        self._stdin.close()
        self._stdout.close()
        return code


class SessionConnection:
    """The agent's side: messages from the session on one descriptor, to it on another.

    Args:
        read_fd: receives orders.
        write_fd: sends events; may be the same socket.
    """

    def __init__(self, *, read_fd: int, write_fd: int) -> None:
        self.read_fd, self._write_fd = read_fd, write_fd
        self._reader, self._buffer = MessageReader(TO_AGENT), WriteBuffer(write_fd)
        self._received: list[AgentMessage] = []
        self._timeout_s = math.inf
        self._last_message_at = math.inf
        self._keepalive = Keepalive(lambda: self.send(Ping()))
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    @property
    def is_lost(self) -> bool:
        """Whether the session is gone: no message is received or sent any more."""
        return self._buffer.is_closed

    @property
    def is_full(self) -> bool:
        """Return whether the session reads too slowly.

        Lines of logs can wait in their files meanwhile.
        """
        return self._buffer.num_bytes > _FULL_BYTES and not self.is_lost

    @property
    def num_queued_bytes(self) -> int:
        """How much is queued and not yet written."""
        return self._buffer.num_bytes

    def receive_assignment(self) -> Assignment:
        """Wait for the first message, the assignment.

        Raises:
            EOFError: the session ended before it sent one.
        """
        while not self._received and not self.is_lost:
            select.select([self.read_fd], [], [])
            self._received += self._read()
        if not self._received:
            raise EOFError("the session is gone")
        first = self._received.pop(0)
        if not isinstance(first, Assignment):
            self._reject(f"a message {first.kind} before the assignment")
            raise EOFError("the session sent no assignment")  # noqa: TRY004 (it is the same as no message)
        return first

    def keep_alive(self, timeout_s: float) -> None:
        """Ping the session every second, and count it as lost after ``timeout_s`` of silence."""
        if timeout_s:
            self._timeout_s, self._last_message_at = timeout_s, time.monotonic()
            self._keepalive.start()

    def receive(self) -> list[AgentMessage]:
        """Return the orders that have arrived completely; keepalives are handled here."""
        messages, self._received = self._received + self._read(), []
        if messages and self._timeout_s < math.inf:
            is_suspended = isinstance(messages[-1], SessionSuspended)
            self._last_message_at = math.inf if is_suspended else time.monotonic()
        if any(isinstance(message, Assignment) for message in messages):
            self._reject("a second assignment")
        return [message for message in messages if not isinstance(message, Ping | SessionSuspended | Assignment)]

    def mark_lost_if_silent(self) -> None:
        """Mark the session as lost if it has been silent for too long."""
        if time.monotonic() - self._last_message_at > self._timeout_s:
            self.mark_lost()

    def mark_lost(self) -> None:
        """Count the session as lost."""
        self._buffer.close()

    def send(self, message: AgentMessage) -> None:
        """Queue a message and write what fits."""
        self._buffer.write(message.encode())

    def flush(self) -> None:
        """Write as much of the queue as fits."""
        self._buffer.flush()

    def flush_all(self) -> None:
        """Write everything that is queued, unless the session is lost; send nothing afterwards."""
        self._keepalive.stop()
        while self._buffer.is_waiting:
            readable, _, _ = select.select([self.read_fd], [self._write_fd], [], 1.0)
            if readable:
                self.receive()
            self.mark_lost_if_silent()
            self.flush()

    def _read(self) -> list[AgentMessage]:
        try:
            data = os.read(self.read_fd, CHUNK_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.mark_lost()
        messages, noise = self._reader.feed(data)
        if noise:
            sys.stderr.buffer.write(b"not a message: " + noise)
        if self._reader.malformed and not self.is_lost:
            self._reject(self._reader.malformed)
        return messages

    def _reject(self, reason: str) -> None:
        """Count the session as lost, because it sent an invalid message."""
        self.mark_lost()
        print(f"the connection to the session is closed: it sent {reason}", file=sys.stderr, flush=True)


class Keepalive:
    """Calls ``ping`` every second, in a thread, until it is stopped."""

    def __init__(self, ping: Callable[[], None]) -> None:
        self._ping = ping
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keepalive", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop it, and wait for a call in progress."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(KEEPALIVE_S):
            self._ping()
