"""File sync: send the run directory of a host without a shared disk to the session.

Checkpoints stay where they are. What the session writes itself (run.yaml, result.json, …) is left alone.
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
"""Of a file that is sent anew whenever it changes; those that only grow may be of any size."""


_SCAN_EVERY_S = 1.0


_CHUNK_BYTES = 1 << 17


_MAX_QUEUED_BYTES = 1 << 19
"""Most that waits to be sent: a rank's end must not stand in line behind minutes of logs."""


_APPENDED_SUFFIXES = (".log", ".jsonl", ".wandb")


@dataclass(eq=False)
class _SyncedFile:
    """What is known of one file."""

    path: Path
    name: str
    inode: int = -1
    sent: int = 0
    """Bytes, of a file that grows."""
    until: int = 0
    """Its size at the last look."""
    changed_at: int = -1
    """Modification time (ns) of what was sent last, or is about to be."""
    payload: bytes | None = None
    """Content of a file that is sent whole, while it is."""

    @property
    def grows(self) -> bool:
        return self.path.suffix in _APPENDED_SUFFIXES


class FileSyncSender:
    """Sends one host's files. Never waits: it sends as much as the connection takes.

    Args:
        run_dir: on this host.
        plan: of this host.
        uplink: to the session.
    """

    def __init__(self, run_dir: RunDir, plan: HostPlan, *, uplink: SessionConnection) -> None:
        self._run_dir, self._plan, self._uplink = run_dir, plan, uplink
        self._files: dict[Path, _SyncedFile] = {}
        self._changed: deque[_SyncedFile] = deque()
        self._too_large: set[Path] = set()
        self._look_at = 0.0
        # ssh writes into the same log on the other side, so ours joins it, from where this life of the run begins
        log = run_dir.log_of(plan.host.name, "agent")
        self._joining = self._files[log] = _SyncedFile(log, str(log.relative_to(run_dir.path)))
        if log.exists():
            self._joining.sent, self._joining.inode = log.stat().st_size, log.stat().st_ino

    def pump(self) -> bool:
        """Send what is new, as far as there is room; return whether some of it is left."""
        if time.monotonic() >= self._look_at:
            self.look()
        while self._changed and not self._uplink.lost and self._uplink.waiting_bytes < _MAX_QUEUED_BYTES:
            try:
                is_sent = self._send_piece(self._changed[0])
            except FileNotFoundError:  # removed since, or replaced at this moment: the next look sees what is there
                is_sent = True
            if is_sent:
                self._changed.popleft()
        return bool(self._changed)

    def look(self) -> None:
        """Find what has changed; ``pump`` does so every second by itself."""
        self._look_at = time.monotonic() + _SCAN_EVERY_S
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

    def left(self) -> list[str]:
        """Return what has not been sent yet."""
        return [file.name for file in self._changed]

    def _is_too_large(self, file: _SyncedFile) -> bool:
        if file.grows or file.until <= MAX_FILE_BYTES:
            return False
        if file.path not in self._too_large:
            self._too_large.add(file.path)
            size, most = file.until >> 20, MAX_FILE_BYTES >> 20
            self._uplink.send(UserNote(text=f"{file.path} stays there: {size} MiB, and at most {most} are sent"))
        return True

    def _send_piece(self, file: _SyncedFile) -> bool:
        """Send the next piece; return whether it was the last for now."""
        return self._send_growth(file) if file.grows else self._send_whole(file)

    def _send_growth(self, file: _SyncedFile) -> bool:
        with file.path.open("rb") as opened:
            status = os.fstat(opened.fileno())
            if status.st_ino != file.inode or status.st_size < file.sent:  # another file by now, or cut
                file.inode, file.sent = status.st_ino, 0
            data = os.pread(opened.fileno(), _CHUNK_BYTES, file.sent)
        offset = None if file is self._joining else file.sent
        self._send(file, data, offset=offset, size=status.st_size)
        file.sent += len(data)
        return not data or file.sent >= file.until

    def _send_whole(self, file: _SyncedFile) -> bool:
        if file.payload is None:
            with file.path.open("rb") as opened:
                status = os.fstat(opened.fileno())  # first: a change while we read is then seen as one
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
        self._uplink.send(FileChunk(path=file.name, offset=offset, data=text, size=size, grows=file.grows))


def is_synced(name: PurePosixPath, plan: HostPlan) -> bool:
    """Whether a file of the run directory comes from the host of ``plan``; of what is not a log, only the first's.

    Args:
        name: relative to the run directory.
        plan: of the host that has it.
    """
    if name.is_absolute() or any(part.startswith(".") for part in name.parts):  # ``..`` and what is half written
        return False
    run_dir = RunDir(Path())
    if name.parts[:1] == (run_dir.logs.name,):
        ranks = range(plan.first_rank, plan.first_rank + plan.host.slots)
        is_log = name.parent == PurePosixPath(run_dir.logs) and name.name.startswith(f"{plan.host.name}.")
        return is_log or Path(name) in {exception_record_file(run_dir, rank) for rank in ranks}
    ours = (run_dir.snapshot, run_dir.plan, run_dir.session, run_dir.result, run_dir.failure, run_dir.timeline)
    return plan.first_rank == 0 and name.parts[:1] != (run_dir.checkpoints.name,) and Path(name) not in ours


def _files_in(folder: Path, plan: HostPlan) -> Iterator[Path]:
    """Yield the files to be sent; links are the host's own affair."""
    for at, folders, names in os.walk(folder):
        if at == str(folder):
            folders[:] = [name for name in folders if name != RunDir(folder).checkpoints.name]
        for path in (Path(at, name) for name in names):
            if is_synced(PurePosixPath(path.relative_to(folder)), plan) and path.is_file() and not path.is_symlink():
                yield path


class FileSyncReceiver:
    """Takes the parts of files, those of one host in their order.

    Args:
        plan: says which host has which files.
    """

    def __init__(self, plan: Plan) -> None:
        self._folder = Path(plan.run_dir)
        self._hosts = {host.host.name: host for host in plan.hosts}
        self._troubled: set[str] = set()

    def take(self, host: str, part: FileChunk) -> str:
        """Write one part; return a sentence for the user when that is not possible, once for each host."""
        try:
            path = self._place(self._hosts[host], part.path)
            if part.grows:
                _append_chunk(path, part)
            else:
                _collect_chunk(path, part)
        except (OSError, ValueError) as problem:
            told = host in self._troubled
            self._troubled.add(host)
            return "" if told else f"{part.path} stays on {host}: {problem}"
        return ""

    def _place(self, host: HostPlan, name: str) -> Path:
        """Return where a file goes.

        Raises:
            ValueError: it is none that this host may send, or a link leads out of the run directory.
        """
        if not PurePosixPath(name).parts or not is_synced(PurePosixPath(name), host):
            raise ValueError("no host may send a file of that name")
        path = self._folder / name
        existing = next(parent for parent in path.parents if parent.exists())
        if not existing.resolve().is_relative_to(self._folder.resolve()):
            raise ValueError(f"{existing} is a link that leads out of the run directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _append_chunk(path: Path, part: FileChunk) -> None:
    """Write a part in its place. A file that is sent once more, after a restart, is left as it is while it agrees."""
    data = base64.b64decode(part.data)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if part.offset is None:
            file.write(data)
            return
        file.seek(part.offset)
        if file.read(len(data)) != data:
            size = file.truncate(part.offset)
            file.seek(part.offset)
            file.write(data)
        if size > part.size:
            file.truncate(part.size)


def _collect_chunk(path: Path, part: FileChunk) -> None:
    """Write a part beside the old content, which is replaced once everything is there."""
    data, offset = base64.b64decode(part.data), part.offset or 0
    arriving = path.with_name(f".{path.name}.arriving")
    with arriving.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(data)
    if offset + len(data) >= part.size:
        arriving.replace(path)
