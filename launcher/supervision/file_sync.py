"""File sync: send the run directory of a host without a shared disk to the session.

Checkpoints are not sent, nor the files that the session writes itself (run.yaml, result.json, …).
"""

from __future__ import annotations

import base64
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.protocol.messages import FileChunk, UserNote
from launcher.protocol.plan import HostPlan, Plan
from launcher.protocol.rank_env import exception_record_file
from launcher.protocol.rundir import RunDir
from launcher.supervision.connection import SessionConnection

MAX_FILE_BYTES = 64 * 2**20
"""Of a file that is sent whole whenever it changes; an append-only file may have any size."""
_SCAN_EVERY_S = 1.0
_CHUNK_BYTES = 1 << 17
_MAX_QUEUED_BYTES = 1 << 19
"""Limit of queued bytes: the exit of a rank must not wait behind minutes of logs."""
_APPENDED_SUFFIXES = (".log", ".jsonl", ".wandb")


@dataclass(eq=False)
class _SyncedFile:
    """State of one file."""

    path: Path
    name: str
    inode: int = -1
    sent: int = 0
    """Bytes sent."""
    until: int = 0
    """Its size at the last scan."""
    changed_at: int = -1
    """Modification time (ns) of the content that is or was sent last."""
    payload: bytes | None = None
    """Content of a file that is being sent whole."""

    @property
    def grows(self) -> bool:
        return self.path.suffix in _APPENDED_SUFFIXES


class FileSyncSender:
    """Sends one host's files. Never blocks: it sends as much as the connection takes.

    Args:
        run_dir: on this host.
        plan: of this host.
        session: connection to the session.
    """

    def __init__(self, run_dir: RunDir, plan: HostPlan, *, session: SessionConnection) -> None:
        self._run_dir, self._plan, self._session = run_dir, plan, session
        self._files: dict[Path, _SyncedFile] = {}
        self._changed: deque[_SyncedFile] = deque()
        self._too_large: set[Path] = set()
        self._scan_at = 0.0
        # ssh writes to the same log on the session's machine, so new lines of this one are appended there
        log = run_dir.log_of(plan.host.name, "agent")
        self._appended_log = self._files[log] = _SyncedFile(log, str(log.relative_to(run_dir.path)))
        if log.exists():
            self._appended_log.sent, self._appended_log.inode = log.stat().st_size, log.stat().st_ino

    def send_some(self) -> bool:
        """Send new content, as far as the connection takes it; return whether some is left."""
        if time.monotonic() >= self._scan_at:
            self.scan()
        while self._changed and not self._session.is_lost and self._session.num_queued_bytes < _MAX_QUEUED_BYTES:
            try:
                is_sent = self._send_chunk(self._changed[0])
            except FileNotFoundError:  # removed or being replaced; the next scan finds what is there
                is_sent = True
            if is_sent:
                self._changed.popleft()
        return bool(self._changed)

    def scan(self) -> None:
        """Find changed files; ``send_some`` does so every second."""
        self._scan_at = time.monotonic() + _SCAN_EVERY_S
        for path in _files_in(self._run_dir.path, self._plan):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            file = self._files.setdefault(path, _SyncedFile(path, path.relative_to(self._run_dir.path).as_posix()))
            if file.grows:
                is_new = status.st_ino != file.inode or status.st_size != file.sent
            else:
                is_new = (status.st_ino, status.st_mtime_ns) != (file.inode, file.changed_at)
            file.until = status.st_size
            if is_new and not self._is_too_large(file) and file not in self._changed:
                self._changed.append(file)

    def unsent(self) -> list[str]:
        """Return the names of files that are not completely sent."""
        return [file.name for file in self._changed]

    def _is_too_large(self, file: _SyncedFile) -> bool:
        if file.grows or file.until <= MAX_FILE_BYTES:
            return False
        if file.path not in self._too_large:
            self._too_large.add(file.path)
            size, limit = file.until >> 20, MAX_FILE_BYTES >> 20
            self._session.send(UserNote(text=f"{file.path} stays there: {size} MiB, over the limit of {limit} MiB"))
        return True

    def _send_chunk(self, file: _SyncedFile) -> bool:
        """Send the next chunk; return whether it was the last for now."""
        return self._send_growth(file) if file.grows else self._send_whole(file)

    def _send_growth(self, file: _SyncedFile) -> bool:
        with file.path.open("rb") as opened:
            status = os.fstat(opened.fileno())
            if status.st_ino != file.inode or status.st_size < file.sent:  # replaced or truncated
                file.inode, file.sent = status.st_ino, 0
            data = os.pread(opened.fileno(), _CHUNK_BYTES, file.sent)
        offset = None if file is self._appended_log else file.sent
        self._send(file, data, offset=offset, size=status.st_size)
        file.sent += len(data)
        return not data or file.sent >= file.until

    def _send_whole(self, file: _SyncedFile) -> bool:
        if file.payload is None:
            with file.path.open("rb") as opened:
                status = os.fstat(opened.fileno())  # before reading, so that a change during the read is seen later
                file.inode, file.changed_at, file.sent = status.st_ino, status.st_mtime_ns, 0
                file.payload = opened.read(MAX_FILE_BYTES)
        data, size = file.payload[file.sent : file.sent + _CHUNK_BYTES], len(file.payload)
        self._send(file, data, offset=file.sent, size=size)
        file.sent += len(data)
        if file.sent < size:
            return False
        file.payload = None
        return True

    def _send(self, file: _SyncedFile, data: bytes, *, offset: int | None, size: int) -> None:
        text = base64.b64encode(data).decode("ascii")
        self._session.send(FileChunk(path=file.name, offset=offset, data=text, size=size, grows=file.grows))


def is_synced(name: PurePosixPath, plan: HostPlan) -> bool:
    """Whether a host sends a file of its run directory; only the first sends more than logs.

    Args:
        name: relative to the run directory.
        plan: of the host.
    """
    if name.is_absolute() or any(part.startswith(".") for part in name.parts):  # ``..`` and temporary files
        return False
    run_dir = RunDir(Path())
    if name.parts[:1] == (run_dir.logs.name,):
        ranks = range(plan.first_rank, plan.first_rank + plan.host.slots)
        is_log = name.parent == PurePosixPath(run_dir.logs) and name.name.startswith(f"{plan.host.name}.")
        return is_log or Path(name) in {exception_record_file(run_dir, rank) for rank in ranks}
    written_by_session = (
        run_dir.snapshot,
        run_dir.plan,
        run_dir.session,
        run_dir.result,
        run_dir.failure,
        run_dir.timeline,
    )
    return (
        plan.first_rank == 0 and name.parts[:1] != (run_dir.checkpoints.name,) and Path(name) not in written_by_session
    )


def _files_in(folder: Path, plan: HostPlan) -> Iterator[Path]:
    """Yield the files to be sent; links are not."""
    for at, folders, names in os.walk(folder):
        if at == str(folder):
            folders[:] = [name for name in folders if name != RunDir(folder).checkpoints.name]
        for path in (Path(at, name) for name in names):
            if is_synced(PurePosixPath(path.relative_to(folder)), plan) and path.is_file() and not path.is_symlink():
                yield path


class FileSyncReceiver:
    """Writes chunks of files; those of one host arrive in order.

    Args:
        plan: says which host has which files.
    """

    def __init__(self, plan: Plan) -> None:
        self._folder = Path(plan.run_dir)
        self._hosts = {host.host.name: host for host in plan.hosts}
        self._failed_hosts: set[str] = set()

    def write(self, host: str, chunk: FileChunk) -> str:
        """Write one chunk; return a sentence for the user when that fails, once for each host."""
        try:
            path = self._destination(self._hosts[host], chunk.path)
            if chunk.grows:
                _append_chunk(path, chunk)
            else:
                _collect_chunk(path, chunk)
        except (OSError, ValueError) as problem:
            is_reported = host in self._failed_hosts
            self._failed_hosts.add(host)
            return "" if is_reported else f"{chunk.path} stays on {host}: {problem}"
        return ""

    def _destination(self, host: HostPlan, name: str) -> Path:
        """Return the path to write a file to.

        Raises:
            ValueError: this host may not send it, or a link leads out of the run directory.
        """
        if not PurePosixPath(name).parts or not is_synced(PurePosixPath(name), host):
            raise ValueError("no host may send a file of that name")
        path = self._folder / name
        existing = next(parent for parent in path.parents if parent.exists())
        if not existing.resolve().is_relative_to(self._folder.resolve()):
            raise ValueError(f"{existing} is a link that leads out of the run directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _append_chunk(path: Path, chunk: FileChunk) -> None:
    """Write a chunk at its offset; content that is sent again after a restart is not rewritten."""
    data = base64.b64decode(chunk.data)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if chunk.offset is None:
            file.write(data)
            return
        file.seek(chunk.offset)
        if file.read(len(data)) != data:
            size = file.truncate(chunk.offset)
            file.seek(chunk.offset)
            file.write(data)
        if size > chunk.size:
            file.truncate(chunk.size)


def _collect_chunk(path: Path, chunk: FileChunk) -> None:
    """Write a chunk to a temporary file, which replaces the old one once it is complete."""
    data, offset = base64.b64decode(chunk.data), chunk.offset or 0
    partial = path.with_name(f".{path.name}.arriving")
    with partial.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(data)
    if offset + len(data) >= chunk.size:
        partial.replace(path)
