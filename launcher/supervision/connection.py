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
from launcher.utils.logs import open_log

_CHUNK = 1 << 16


_FULL = 1 << 22


KEEPALIVE_S = 1.0


class AgentConnection(ABC):
    """Messages to and from one host's agent; backends differ in how they open it.

    ``send`` may be called from a second thread.
    """

    host: str
    """Name of the host in the plan."""
    program: str | None
    """What carries the messages (``ssh``), and whose exit code ``close`` returns; ``None`` for a bare socket."""
    _inbox: MessageReader

    @property
    def malformed(self) -> str:
        """What arrived that no agent sends, in words; empty while there is nothing of that kind."""
        return self._inbox.malformed

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor that is readable when there are messages."""

    @abstractmethod
    def outlet(self) -> int | None:
        """Return the descriptor to wait for until it is writable; ``None`` when nothing waits to be sent."""

    @abstractmethod
    def send(self, message: AgentMessage) -> None:
        """Queue one message and write what fits; an agent that is gone is noticed by ``receive``."""

    @abstractmethod
    def flush(self) -> None:
        """Write what fits of the queue."""

    @abstractmethod
    def receive(self) -> list[AgentMessage] | None:
        """Return the messages that have arrived; ``None`` once the agent is gone."""

    @abstractmethod
    def close(self) -> int:
        """Break the connection off if it is not broken; return the exit code behind it, negative for a signal."""


class PipeConnection(AgentConnection):
    """The agent's stdin and stdout are those of a child of this process: the agent itself, ssh, srun.

    Args:
        host: its name in the plan.
        remote: what to start, in a session of its own, so that the terminal's Ctrl-C is for the caller alone.
        log: takes what the command itself has to say, above all when it breaks.
    """

    def __init__(self, host: str, remote: RemoteCommand, *, log: Path) -> None:
        self.host, self.program = host, Path(remote.argv[0]).name
        with open_log(log) as errors:
            self._popen = subprocess.Popen(
                remote.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                bufsize=0,
            )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
        os.set_blocking(self._stdin.fileno(), False)
        self._inbox, self._log = MessageReader(FROM_AGENT), log
        self._lock = threading.Lock()
        self._queue = bytearray(remote.prologue)
        self._is_broken = False

    def fileno(self) -> int:
        """Return the command's stdout."""
        return self._stdout.fileno()

    def outlet(self) -> int | None:
        """Return the command's stdin while something waits."""
        return self._stdin.fileno() if self._queue and not self._is_broken else None

    def send(self, message: AgentMessage) -> None:
        """Write to the command's stdin."""
        with self._lock:
            self._queue += message.encode()
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes."""
        with self._lock:
            while self._queue and not self._is_broken:
                try:
                    written = os.write(self._stdin.fileno(), self._queue[:_CHUNK])
                except BlockingIOError:
                    return
                except BrokenPipeError:
                    self._is_broken = True
                    return
                del self._queue[:written]

    def receive(self) -> list[AgentMessage] | None:
        """Read what has arrived; call it when ``fileno`` is readable."""
        data = os.read(self._stdout.fileno(), _CHUNK)
        if not data:
            return None
        messages, noise = self._inbox.take(data)
        if noise:
            with self._log.open("ab") as log:
                log.write(noise)
        return messages

    def close(self) -> int:
        """Kill the command if it has not ended."""
        self._popen.kill()
        code = self._popen.wait()
        with self._lock:
            self._is_broken = True
            self._stdin.close()
        self._stdout.close()
        return code


class SessionConnection:
    """Messages in on one descriptor, out on another.

    Args:
        inbox: where orders come from.
        outbox: where events go; may be the same socket.
    """

    def __init__(self, *, inbox: int, outbox: int) -> None:
        self.inbox, self.outbox = inbox, outbox
        self.lost = False
        """The session is gone: nothing will be read or answered any more."""
        self._incoming, self._outgoing = MessageReader(TO_AGENT), bytearray()
        self._waiting: list[AgentMessage] = []
        self._lock = threading.Lock()
        self._timeout_s = math.inf
        self._heard_at = math.inf
        self._pulse = Keepalive(lambda: self.send(Ping()))
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

    def receive(self) -> list[AgentMessage]:
        """Return the orders that have arrived whole, and look whether the session is still there."""
        arrived, self._waiting = self._waiting + self._read(), []
        if arrived and self._timeout_s < math.inf:
            is_held = isinstance(arrived[-1], SessionSuspended)
            self._heard_at = math.inf if is_held else time.monotonic()
        if any(isinstance(order, Assignment) for order in arrived):
            self._break_off("a second assignment")
        return [order for order in arrived if not isinstance(order, Ping | SessionSuspended | Assignment)]

    def check(self) -> None:
        """Notice a session that has been silent for too long."""
        if time.monotonic() - self._heard_at > self._timeout_s:
            self.lost = True

    def send(self, message: AgentMessage) -> None:
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

    def _read(self) -> list[AgentMessage]:
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


class Keepalive:
    """Calls ``heartbeat`` every second until it is stopped."""

    def __init__(self, heartbeat: Callable[[], None]) -> None:
        self._heartbeat = heartbeat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait until no call is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(KEEPALIVE_S):
            self._heartbeat()
