"""Files of hosts that share no disk with the session, written below its own run directory as they arrive."""

from __future__ import annotations

import base64
import os
from pathlib import Path, PurePosixPath

from launcher.plan import HostPlan, Plan
from launcher.supervise.messages import FilePart
from launcher.supervise.mirror import is_mirrored


class Arrivals:
    """Takes the parts of files, those of one host in their order.

    Args:
        plan: says which host has which files.
    """

    def __init__(self, plan: Plan) -> None:
        self._folder = Path(plan.run_dir)
        self._hosts = {host.host.name: host for host in plan.hosts}
        self._troubled: set[str] = set()

    def take(self, host: str, part: FilePart) -> str:
        """Write one part; return a sentence for the user when that is not possible, once for each host."""
        try:
            path = self._place(self._hosts[host], part.path)
            if part.grows:
                _extend(path, part)
            else:
                _collect(path, part)
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
        if not PurePosixPath(name).parts or not is_mirrored(PurePosixPath(name), host):
            raise ValueError("no host may send a file of that name")
        path = self._folder / name
        existing = next(parent for parent in path.parents if parent.exists())
        if not existing.resolve().is_relative_to(self._folder.resolve()):
            raise ValueError(f"{existing} is a link that leads out of the run directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _extend(path: Path, part: FilePart) -> None:
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


def _collect(path: Path, part: FilePart) -> None:
    """Write a part beside the old content, which is replaced once everything is there."""
    data, offset = base64.b64decode(part.data), part.offset or 0
    arriving = path.with_name(f".{path.name}.arriving")
    with arriving.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(data)
    if offset + len(data) >= part.size:
        arriving.replace(path)
