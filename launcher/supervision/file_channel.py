"""File channel between rank monitors and an agent elsewhere: files in the run directory.

External launchers start ranks on other machines without an agent beside them; both sides share the run directory.
The agent writes ``agent.json`` every second, with the signals to send to the ranks; each rank monitor writes
``rank<k>.json``, with the heartbeat and the exit of its rank. A side whose sequence number stops changing is gone.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from launcher.protocol.heartbeat import HEARTBEAT_BYTES, HeartbeatState, read_heartbeat
from launcher.protocol.rundir import RunDir
from launcher.protocol.wire import MalformedMessage, decode
from launcher.supervision.socket_channel import MonitorMessage

WRITE_EVERY_S = 1.0
"""Time between two writes of a side."""

T = TypeVar("T")


class StartFile(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``start.json``, which the agent writes once."""

    token: str
    """Of this start; files of another one are ignored."""
    cwd: str
    env: dict[str, str]


class AgentFile(msgspec.Struct, frozen=True, kw_only=True):
    """Content of the agent's file."""

    token: str
    sequence: int
    signals: list[int]
    """All signals for the ranks since the start."""
    is_over: bool


class MonitorFile(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a monitor's file; each group of fields that may be ``None`` is added later."""

    token: str
    sequence: int
    age_s: float
    heartbeat: HeartbeatState | None
    monitor_pid: int | None = None
    pid: int | None = None
    launcher_exited_at: float | None = None
    status: int | None = None
    time: float | None = None
    by_launcher: bool = False


def channel_folder(run_dir: RunDir) -> Path:
    """Return the folder of the channel in a run directory."""
    return run_dir.path / "channel"


def agent_file(folder: Path) -> Path:
    """Return the agent's file, an ``AgentFile``."""
    return folder / "agent.json"


def rank_file(folder: Path, rank: int) -> Path:
    """Return the file of a rank's monitor, a ``MonitorFile``."""
    return folder / f"rank{rank}.json"


def write_channel_file(path: Path, content: msgspec.Struct | Mapping[str, Any]) -> None:
    """Replace a file atomically, without waiting until it is on the disk."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(msgspec.to_builtins(content)), encoding="utf-8")
    temporary.replace(path)


def read_channel_file(path: Path, wanted: type[T]) -> T | None:
    """Return the content of a file; ``None`` when it is absent or invalid."""
    try:
        content: T = decode(path.read_bytes(), wanted)
    except (OSError, MalformedMessage):
        return None
    return content


def mark_run_over(run_dir: RunDir) -> None:
    """Mark the run as over, in case its agent could not."""
    content = read_channel_file(agent_file(channel_folder(run_dir)), AgentFile)
    if content is not None and not content.is_over:
        with contextlib.suppress(OSError):  # then the monitors time out and end their ranks
            write_channel_file(agent_file(channel_folder(run_dir)), msgspec.structs.replace(content, is_over=True))


class Lease:
    """Expires when a sequence number has not changed for ``timeout_s`` of the local clock."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._sequence, self._changed_at = timeout_s, -1, time.monotonic()

    def renew(self, sequence: int) -> None:
        """Record the present number."""
        if sequence != self._sequence:
            self._sequence, self._changed_at = sequence, time.monotonic()

    @property
    def silent_s(self) -> float:
        """Time since it last changed."""
        return time.monotonic() - self._changed_at

    @property
    def is_expired(self) -> bool:
        """Whether that exceeds the timeout."""
        return self.silent_s > self._timeout_s


class FileChannel:
    """The rank monitor's side; has the interface of ``SocketChannel``.

    Args:
        folder: of the channel.
        rank: of this monitor.
        token: of the start that this rank belongs to.
        timeout_s: silence of the agent after which it counts as gone.
    """

    def __init__(self, folder: Path, *, rank: int, token: str, timeout_s: float) -> None:
        self.heartbeat = mmap.mmap(-1, HEARTBEAT_BYTES)
        """Shared with the rank, which is forked from this process."""
        self._folder, self._rank, self._token = folder, rank, token
        self._parent, self._lease = os.getppid(), Lease(timeout_s)
        self._fields: dict[str, Any] = {}
        self._sequence = self._num_signals = 0
        self._write_at = 0.0
        self._is_over = False

    def send(self, message: MonitorMessage) -> None:
        """Add the fields of a message to the monitor's file."""
        self._fields |= msgspec.structs.asdict(message)
        self._write()

    def signals(self) -> list[int]:
        """Return new signals that the agent orders; write the monitor's file when it is time."""
        if time.monotonic() >= self._write_at:
            self._write_at = time.monotonic() + WRITE_EVERY_S
            self._write()
        content = read_channel_file(agent_file(self._folder), AgentFile)
        if content is None:
            return []
        self._is_over = content.is_over or content.token != self._token
        self._lease.renew(content.sequence)
        new = content.signals[self._num_signals :] if not self._is_over else []
        self._num_signals += len(new)
        return new

    def is_closed(self) -> bool:
        """Return whether the run is over, its agent silent, or the launcher of this rank gone."""
        if os.getppid() != self._parent:
            self._fields.setdefault("launcher_exited_at", time.time())
        return self._is_over or self._lease.is_expired or "launcher_exited_at" in self._fields

    def clean_up_after_agent(self) -> None:
        """Do nothing: the folder is part of the run directory, and other monitors read it."""

    def close(self) -> None:
        """Do nothing: the rank's process holds no resource of the channel."""

    def _write(self) -> None:
        self._sequence += 1
        state, now = read_heartbeat(self.heartbeat), time.monotonic()
        age_s = max(0.0, now - state.at) if state else 0.0
        content = {"token": self._token, "sequence": self._sequence, "heartbeat": state, "age_s": age_s, **self._fields}
        with contextlib.suppress(OSError):  # a full or absent disk: the agent will detect the silence
            write_channel_file(rank_file(self._folder, self._rank), content)
