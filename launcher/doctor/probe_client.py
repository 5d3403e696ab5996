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
from launcher.utils.system import child_environment, raise_open_file_limit

PROBE_MODULE = "launcher.doctor.probe"
_CLOSE_S = 1.0
"""Time for probes to exit by themselves once their stdin is closed."""
_FILES_PER_HOST = 3
_FILES_OF_DOCTOR = 64
_WRITE, _READ, _READ_STDERR = "write", "read", "read stderr"
_CHUNK = 1 << 16
_MAX_STDERR_BYTES = 1 << 14
_MAX_LINE_BYTES = 1 << 22
"""More than any message; a longer line is dropped."""
_EXIT_S = 1.0
"""Time for a command to exit after it has closed its stdout."""


class ProbeClient:
    """Starts one probe per host, and ends all of them at the end of the ``with`` block."""

    def __init__(self, hosts: Sequence[Host], remote: Callable[[Host, str], RemoteCommand]) -> None:
        self._hosts, self._remote = hosts, remote
        self.probes: dict[str, ProbeProcess] = {}
        self.not_started: dict[str, str] = {}
        """Why the probe could not be started, by host."""
        self._cleanup = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> ProbeClient:
        with contextlib.ExitStack() as undo:
            undo.enter_context(raise_open_file_limit(_FILES_PER_HOST * len(self._hosts) + _FILES_OF_DOCTOR))
            undo.callback(self._end)
            for host in self._hosts:
                self._open(host)
                self._serve(0.0)  # serves the first ones while others are started
            self._cleanup = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def ask(self, name: str, request: dict[str, Any]) -> None:
        """Send a request to one host; one that is gone never answers."""
        probe = self.probes[name]
        if probe.is_open:
            probe.ask(request)
            self._watch_stdin(probe)

    def collect(self, kind: str, names: Iterable[str], *, until: float) -> dict[str, dict[str, Any]]:
        """Return the answers of a kind that arrive before ``until`` (monotonic), by host."""
        waiting = {name for name in names if name in self.probes}
        answers: dict[str, dict[str, Any]] = {}
        changed = {self.probes[name] for name in waiting}
        while True:
            for probe in changed:
                found = next((message for message in probe.messages if message["doctor"] == kind), None)
                if found is not None and probe.name in waiting:
                    answers[probe.name] = found
                if found is not None or not probe.is_open:
                    waiting.discard(probe.name)
            remaining_s = until - time.monotonic()
            if not waiting or remaining_s <= 0:
                return answers
            changed = self._serve(remaining_s)

    def messages_of(self, name: str, kind: str) -> Iterator[dict[str, Any]]:
        """Yield every message of a kind that a host has sent."""
        return (message for message in self.probes[name].messages if message["doctor"] == kind)

    def _open(self, host: Host) -> None:
        try:
            probe = ProbeProcess(host.name, self._remote(host, PROBE_MODULE))
        except OSError as error:
            self.not_started[host.name] = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            return
        self.probes[host.name] = probe
        self._selector.register(probe.stdout, selectors.EVENT_READ, (_READ, probe))
        self._selector.register(probe.stderr, selectors.EVENT_READ, (_READ_STDERR, probe))
        self._watch_stdin(probe)

    def _watch_stdin(self, probe: ProbeProcess) -> None:
        if probe.has_unsent and probe.stdin not in self._selector.get_map():
            self._selector.register(probe.stdin, selectors.EVENT_WRITE, (_WRITE, probe))

    def _serve(self, timeout_s: float) -> set[ProbeProcess]:
        """Wait for probes that are readable or writable, serve them, and return them."""
        changed = set()
        for key, _ in self._selector.select(timeout_s):
            action, probe = key.data
            changed.add(probe)
            if action == _WRITE:
                probe.write()
                has_more = probe.has_unsent
            else:
                has_more = probe.read() if action == _READ else probe.read_stderr()
            if not has_more:
                self._selector.unregister(key.fileobj)
        return changed

    def _end(self) -> None:
        for probe in self.probes.values():
            if probe.stdin in self._selector.get_map():
                self._selector.unregister(probe.stdin)
            probe.close_stdin()
        answered = [probe for probe in self.probes.values() if probe.messages]  # the others run no probe
        deadline = time.monotonic() + _CLOSE_S
        while any(probe.is_open for probe in answered) and (remaining_s := deadline - time.monotonic()) > 0:
            self._serve(remaining_s)
        self._selector.close()
        for probe in self.probes.values():
            probe.end()


class ProbeProcess:
    """The command that runs the probe of one host.

    Args:
        name: of the host.
        remote: command to start, in a session of its own, so that Ctrl-C in the terminal signals the doctor only.

    Raises:
        OSError: the program does not exist.
    """

    def __init__(self, name: str, remote: RemoteCommand) -> None:
        self.name = name
        self.messages: list[dict[str, Any]] = []
        self.is_open = True
        """Whether its stdout is open."""
        self.exit_code: int | None = None
        """Exit code of the command; ``None`` when it still ran as its stdin was closed."""
        self._popen = subprocess.Popen(
            remote.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**child_environment(), **remote.env},
            start_new_session=True,
            bufsize=0,
        )
        self.stdin, self.stdout, self.stderr = map(
            _non_blocking, (self._popen.stdin, self._popen.stdout, self._popen.stderr)
        )
        self._unsent = bytearray(remote.prologue)
        self._partial = b""
        self._stderr_bytes = b""

    @property
    def has_unsent(self) -> bool:
        """Whether bytes wait until ``stdin`` is writable."""
        return bool(self._unsent)

    @property
    def stderr_tail(self) -> str:
        """The end of its stderr."""
        return self._stderr_bytes.decode(errors="replace")

    def ask(self, request: dict[str, Any]) -> None:
        """Queue one request."""
        self._unsent += json.dumps(request).encode() + b"\n"

    def write(self) -> None:
        """Write as much as the pipe takes."""
        try:
            del self._unsent[: os.write(self.stdin.fileno(), self._unsent[:_CHUNK])]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the reason comes over stderr and stdout
            self._unsent.clear()

    def read(self) -> bool:
        """Read what stdout has; return whether more may come."""
        data = _read(self.stdout)
        if data is None:
            return True
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _MAX_LINE_BYTES:
            self._partial = b""
        now = time.time()
        for message in filter(None, map(parse_message, lines)):
            self.messages.append({**message, "received_at": now})
        self.is_open = bool(data)
        return self.is_open

    def read_stderr(self) -> bool:
        """Read what stderr has; return whether more may come."""
        data = _read(self.stderr)
        self._stderr_bytes = (self._stderr_bytes + (data or b""))[-_MAX_STDERR_BYTES:]
        return data != b""

    def close_stdin(self) -> None:
        """Close stdin, which ends the probe and its children."""
        if not self.is_open:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.exit_code = self._popen.wait(timeout=_EXIT_S)
        self.stdin.close()

    def end(self) -> None:
        """Kill the command if it still runs; read the rest of its stderr."""
        self._popen.kill()
        self._popen.wait()
        self.read_stderr()
        self.stdout.close()
        self.stderr.close()


def _non_blocking(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    return pipe


def _read(pipe: IO[bytes]) -> bytes | None:
    try:
        return os.read(pipe.fileno(), _CHUNK)
    except BlockingIOError:
        return None
