"""Which file server holds a folder: hosts that say the same share it, whether this machine does or not."""

from __future__ import annotations

import re
from pathlib import Path

_OF_THE_NETWORK = re.compile(
    r"(fuse\.)?(nfs4?|lustre|gpfs|beegfs|beegfs_nodev|ceph|cifs|smb3|glusterfs|afs|pvfs2|wekafs)"
)
"""Types of file systems whose source is the same name on every host."""


def served_folder(folder: Path, *, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return server and path there of an existing folder; empty where the disk is local, or of an unknown kind."""
    folder = folder.resolve()
    found = ""
    longest = -1
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        root, point = (Path(_unescaped(word)) for word in before.split()[3:5])
        kind, source = after.split()[:2]
        if len(point.parts) >= longest and folder.is_relative_to(point):  # of two at one place, the later lies on top
            longest = len(point.parts)
            place = root / folder.relative_to(point)
            found = f"{kind} {_unescaped(source)} {place}" if _OF_THE_NETWORK.fullmatch(kind) else ""
    return found


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), word)
