"""Logs: split bytes into lines, follow and append to a file, silence import-time records."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import IO

from launcher.utils.files import open_append
from launcher.utils.system import is_disk_full_error

_MAX_LINE_BYTES = 1 << 20
"""Length at which an unfinished line is returned in pieces."""
_CHUNK = 1 << 18

_SILENCED_AT_IMPORT = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": " is an Enum subclass and is now natively supported",
}


class LineSplitter:
    """Collects bytes and returns the lines that are complete.

    Invalid UTF-8 becomes U+FFFD. Of a line that was rewritten with carriage returns (a progress bar) the last state
    is kept.
    """

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that ``data`` completes."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _MAX_LINE_BYTES:
            lines.append(self._partial)
            self._partial = b""
        return [_text(line) for line in lines]

    def rest(self) -> list[str]:
        """Return the unfinished last line, if there is one."""
        partial, self._partial = self._partial, b""
        return [_text(partial)] if partial else []


def open_log(path: Path) -> IO[bytes]:
    """Open a log to append to it; on a disk too full for a new file, discard what is written."""
    try:
        return open_append(path, buffering=0)
    except OSError as error:
        if not is_disk_full_error(error):
            raise
        return Path(os.devnull).open("ab", buffering=0)


class LogTail:
    """Follows a log file from where it ends now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._splitter = LineSplitter()
        self._start = self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[str]:
        """Return some of the whole lines written since the last call; empty when there are none."""
        data = self._bytes()
        return self._splitter.feed(data) if data else []

    def drain(self) -> list[str]:
        """Return the rest, the unfinished last line too."""
        lines = []
        while data := self._bytes():
            lines += self._splitter.feed(data)
        return lines + self._splitter.rest()

    def last(self, count: int) -> str:
        """Return the last ``count`` lines written since this tail began."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            file.seek(max(self._start, self.path.stat().st_size - _CHUNK))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-count:])

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _bytes(self) -> bytes:
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # the rank has not started
                return b""
        data = os.pread(self._descriptor, _CHUNK, self._offset)
        self._offset += len(data)
        return data


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


def quiet_libraries() -> None:
    """Drop log records of libraries at import that a user of this program cannot avoid.

    In every process, torchao logs each compiled file that is for another machine, and torch logs that torchao registers
    its enums in a deprecated way.
    """
    for logger, text in _SILENCED_AT_IMPORT.items():
        logging.getLogger(logger).addFilter(_DropRecordsWith(text))


class _DropRecordsWith(logging.Filter):
    """Drops records that hold a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to keep it."""
        return self._text not in str(record.msg)
