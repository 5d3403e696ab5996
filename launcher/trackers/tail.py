"""Following a growing ``metrics.jsonl`` without a watcher: new whole lines since the last look, each once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launcher.results import parse_line


class Tail:
    """Reads what was appended since the last read.

    The file may not exist yet, may end in half a line, and may be replaced: a resumed run cuts off what it will do
    again. Lines come in the order of their strictly rising times, which tell those already read in a new file.

    Args:
        path: a ``metrics.jsonl``.
        after: leave out lines up to this time.
    """

    def __init__(self, path: Path, *, after: float = 0.0) -> None:
        self._path, self._offset, self._inode = path, 0, -1
        self.last_time = after
        """Time of the last line read."""

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines that are new."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = [
            line for line in map(parse_line, whole.splitlines()) if line and line.get("time", 0.0) > self.last_time
        ]
        if lines:
            self.last_time = lines[-1]["time"]
        return lines
