"""Probes of all hosts as child processes, served by one thread that never blocks."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from launcher.doctor.protocol import parse_message
from launcher.protocol.plan import Host
from launcher.remote.command import RemoteCommand
from launcher.utils.system import raise_open_file_limit

PROBE_MODULE = "launcher.doctor.probe"


_FAREWELL_S = 1.0
"""Time for probes to end by themselves once their stdin has ended."""


_FILES_PER_HOST = 3


_FILES_OF_OURS = 64


_WRITE, _READ, _COMPLAIN = "write", "read", "complain"


_CHUNK = 1 << 16


_MOST_STDERR = 1 << 14


_LONGEST_LINE = 1 << 22
"""Far more than a probe says in one; the rest of a longer one is noise."""


_EXIT_S = 1.0
"""Time to exit for a command that has closed its stdout."""


class ProbeClient:
    """Opens one channel a host, and ends all of them when the ``with`` block ends."""

    def __init__(self, hosts: Sequence[Host], remote: Callable[[Host, str], RemoteCommand]) -> None:
        self._hosts, self._remote = hosts, remote
        self.channels: dict[str, ProbeProcess] = {}
        self.not_started: dict[str, str] = {}
        """Why there is no channel, by host."""
        self._cleanup = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> ProbeClient:
        with contextlib.ExitStack() as undo:
            undo.enter_context(raise_open_file_limit(_FILES_PER_HOST * len(self._hosts) + _FILES_OF_OURS))
            undo.callback(self._end)
            for host in self._hosts:
                self._open(host)
                self._serve(0.0)  # the first ones need not wait until a thousand are started
            self._cleanup = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def ask(self, name: str, question: dict[str, Any]) -> None:
        """Send a question to one host; one that is gone never answers."""
        channel = self.channels[name]
        if channel.is_open:
            channel.ask(question)
            self._watch_stdin(channel)

    def collect(self, kind: str, names: Iterable[str], *, until: float) -> dict[str, dict[str, Any]]:
        """Return the answers of a kind, by host, without those that are gone or silent until ``until`` (monotonic)."""
        waiting = {name for name in names if name in self.channels}
        answers: dict[str, dict[str, Any]] = {}
        changed = {self.channels[name] for name in waiting}
        while True:
            for channel in changed:
                found = next((message for message in channel.messages if message["doctor"] == kind), None)
                if found is not None and channel.name in waiting:
                    answers[channel.name] = found
                if found is not None or not channel.is_open:
                    waiting.discard(channel.name)
            left = until - time.monotonic()
            if not waiting or left <= 0:
                return answers
            changed = self._serve(left)

    def told(self, name: str, kind: str) -> Iterator[dict[str, Any]]:
        """Yield every message of a kind that has come from a host."""
        return (message for message in self.channels[name].messages if message["doctor"] == kind)

    def _open(self, host: Host) -> None:
        try:
            channel = ProbeProcess(host.name, self._remote(host, PROBE_MODULE))
        except OSError as error:
            self.not_started[host.name] = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            return
        self.channels[host.name] = channel
        self._selector.register(channel.stdout, selectors.EVENT_READ, (_READ, channel))
        self._selector.register(channel.stderr, selectors.EVENT_READ, (_COMPLAIN, channel))
        self._watch_stdin(channel)

    def _watch_stdin(self, channel: ProbeProcess) -> None:
        if channel.has_unsent and channel.stdin not in self._selector.get_map():
            self._selector.register(channel.stdin, selectors.EVENT_WRITE, (_WRITE, channel))

    def _serve(self, timeout_s: float) -> set[ProbeProcess]:
        """Move what can be moved, wait for the first of it, and return whose it was."""
        changed = set()
        for key, _ in self._selector.select(timeout_s):
            does, channel = key.data
            changed.add(channel)
            if does == _WRITE:
                channel.write()
                goes_on = channel.has_unsent
            else:
                goes_on = channel.read() if does == _READ else channel.read_complaints()
            if not goes_on:
                self._selector.unregister(key.fileobj)
        return changed

    def _end(self) -> None:
        for channel in self.channels.values():
            if channel.stdin in self._selector.get_map():
                self._selector.unregister(channel.stdin)
            channel.hang_up()
        answered = [channel for channel in self.channels.values() if channel.messages]  # the others have nothing to end
        ends = time.monotonic() + _FAREWELL_S
        while any(channel.is_open for channel in answered) and (left := ends - time.monotonic()) > 0:
            self._serve(left)
        self._selector.close()
        for channel in self.channels.values():
            channel.end()


class ProbeProcess:
    """A probe that was started.

    Args:
        name: of the host.
        remote: what to start, in a session of its own, so that the terminal's Ctrl-C is for the doctor alone.

    Raises:
        OSError: the program is not there.
    """

    def __init__(self, name: str, remote: RemoteCommand) -> None:
        self.name = name
        self.messages: list[dict[str, Any]] = []
        self.is_open = True
        """Whether it may still say something."""
        self.exit_code: int | None = None
        """How the command ended before we hung up; ``None`` when it did not."""
        self._popen = subprocess.Popen(
            remote.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        self.stdin, self.stdout, self.stderr = map(
            _unblocked, (self._popen.stdin, self._popen.stdout, self._popen.stderr)
        )
        self._unsent = bytearray(remote.prologue)
        self._partial = b""
        self._said = b""

    @property
    def has_unsent(self) -> bool:
        """Whether something waits until ``stdin`` is writable."""
        return bool(self._unsent)

    @property
    def complaint(self) -> str:
        """The end of what came over stderr."""
        return self._said.decode(errors="replace")

    def ask(self, question: dict[str, Any]) -> None:
        """Queue one question."""
        self._unsent += json.dumps(question).encode() + b"\n"

    def write(self) -> None:
        """Send what the pipe takes."""
        try:
            del self._unsent[: os.write(self.stdin.fileno(), self._unsent[:_CHUNK])]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the reason comes over stderr and stdout
            self._unsent.clear()

    def read(self) -> bool:
        """Take what stdout has; return whether more may come."""
        data = _read(self.stdout)
        if data is None:
            return True
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _LONGEST_LINE:
            self._partial = b""
        now = time.time()
        for message in filter(None, map(parse_message, lines)):
            self.messages.append({**message, "heard": now})
        self.is_open = bool(data)
        return self.is_open

    def read_complaints(self) -> bool:
        """Take what stderr has; return whether more may come."""
        data = _read(self.stderr)
        self._said = (self._said + (data or b""))[-_MOST_STDERR:]
        return data != b""

    def hang_up(self) -> None:
        """Close stdin, which ends the probe and with it what it started."""
        if not self.is_open:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.exit_code = self._popen.wait(timeout=_EXIT_S)
        self.stdin.close()

    def end(self) -> None:
        """Kill the command if it has not ended; keep what it said last."""
        self._popen.kill()
        self._popen.wait()
        self.read_complaints()
        self.stdout.close()
        self.stderr.close()


def _unblocked(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    return pipe


def _read(pipe: IO[bytes]) -> bytes | None:
    try:
        return os.read(pipe.fileno(), _CHUNK)
    except BlockingIOError:
        return None
