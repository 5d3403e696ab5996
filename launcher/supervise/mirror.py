"""The run directory of a host that shares no disk with the session: what is written there is sent over, as it grows.

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

from launcher.plan import HostPlan
from launcher.rundir import RunDir
from launcher.supervise.messages import FilePart, Note
from launcher.supervise.rank_env import record_of
from launcher.supervise.uplink import Uplink

LARGEST_BYTES = 64 * 2**20
"""Of a file that is sent anew whenever it changes; those that only grow may be of any size."""

_LOOK_S = 1.0
_PIECE_BYTES = 1 << 17
_ROOM_BYTES = 1 << 19
"""Most that waits to be sent: a rank's end must not stand in line behind minutes of logs."""

_GROWING = (".log", ".jsonl", ".wandb")


@dataclass(eq=False)
class _File:
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
        return self.path.suffix in _GROWING


class Mirror:
    """Sends one host's files. Never waits: it sends as much as the connection takes.

    Args:
        run_dir: on this host.
        plan: of this host.
        uplink: to the session.
    """

    def __init__(self, run_dir: RunDir, plan: HostPlan, *, uplink: Uplink) -> None:
        self._run_dir, self._plan, self._uplink = run_dir, plan, uplink
        self._files: dict[Path, _File] = {}
        self._changed: deque[_File] = deque()
        self._too_large: set[Path] = set()
        self._look_at = 0.0
        # ssh writes into the same log on the other side, so ours joins it, from where this life of the run begins
        log = run_dir.log_of(plan.host.name, "agent")
        self._joining = self._files[log] = _File(log, str(log.relative_to(run_dir.path)))
        if log.exists():
            self._joining.sent, self._joining.inode = log.stat().st_size, log.stat().st_ino

    def pump(self) -> bool:
        """Send what is new, as far as there is room; return whether some of it is left."""
        if time.monotonic() >= self._look_at:
            self.look()
        while self._changed and not self._uplink.lost and self._uplink.waiting_bytes < _ROOM_BYTES:
            try:
                is_sent = self._send_piece(self._changed[0])
            except FileNotFoundError:  # removed since, or replaced at this moment: the next look sees what is there
                is_sent = True
            if is_sent:
                self._changed.popleft()
        return bool(self._changed)

    def look(self) -> None:
        """Find what has changed; ``pump`` does so every second by itself."""
        self._look_at = time.monotonic() + _LOOK_S
        for path in _files_in(self._run_dir.path, self._plan):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            file = self._files.setdefault(path, _File(path, path.relative_to(self._run_dir.path).as_posix()))
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

    def _is_too_large(self, file: _File) -> bool:
        if file.grows or file.until <= LARGEST_BYTES:
            return False
        if file.path not in self._too_large:
            self._too_large.add(file.path)
            size, most = file.until >> 20, LARGEST_BYTES >> 20
            self._uplink.send(Note(text=f"{file.path} stays there: {size} MiB, and at most {most} are sent"))
        return True

    def _send_piece(self, file: _File) -> bool:
        """Send the next piece; return whether it was the last for now."""
        return self._send_growth(file) if file.grows else self._send_whole(file)

    def _send_growth(self, file: _File) -> bool:
        with file.path.open("rb") as opened:
            status = os.fstat(opened.fileno())
            if status.st_ino != file.inode or status.st_size < file.sent:  # another file by now, or cut
                file.inode, file.sent = status.st_ino, 0
            data = os.pread(opened.fileno(), _PIECE_BYTES, file.sent)
        offset = None if file is self._joining else file.sent
        self._send(file, data, offset=offset, size=status.st_size)
        file.sent += len(data)
        return not data or file.sent >= file.until

    def _send_whole(self, file: _File) -> bool:
        if file.payload is None:
            with file.path.open("rb") as opened:
                status = os.fstat(opened.fileno())  # first: a change while we read is then seen as one
                file.inode, file.changed_at, file.sent = status.st_ino, status.st_mtime_ns, 0
                file.payload = opened.read(LARGEST_BYTES)
        data, size = file.payload[file.sent : file.sent + _PIECE_BYTES], len(file.payload)
        self._send(file, data, offset=file.sent, size=size)
        file.sent += len(data)
        if file.sent < size:
            return False
        file.payload = None
        return True

    def _send(self, file: _File, data: bytes, *, offset: int | None, size: int) -> None:
        text = base64.b64encode(data).decode("ascii")
        self._uplink.send(FilePart(path=file.name, offset=offset, data=text, size=size, grows=file.grows))


def is_mirrored(name: PurePosixPath, plan: HostPlan) -> bool:
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
        return is_log or Path(name) in {record_of(run_dir, rank) for rank in ranks}
    ours = (run_dir.snapshot, run_dir.plan, run_dir.session, run_dir.result, run_dir.failure, run_dir.timeline)
    return plan.first_rank == 0 and name.parts[:1] != (run_dir.checkpoints.name,) and Path(name) not in ours


def _files_in(folder: Path, plan: HostPlan) -> Iterator[Path]:
    """Yield the files to be sent; links are the host's own affair."""
    for at, folders, names in os.walk(folder):
        if at == str(folder):
            folders[:] = [name for name in folders if name != RunDir(folder).checkpoints.name]
        for path in (Path(at, name) for name in names):
            if is_mirrored(PurePosixPath(path.relative_to(folder)), plan) and path.is_file() and not path.is_symlink():
                yield path
