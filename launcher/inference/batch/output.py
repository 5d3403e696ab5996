"""Answers on disk: a part file for each rank, their index, and the merge into one file."""

from __future__ import annotations

import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from launcher.config.job.generate import CLAIM_FILE, owns_output
from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.utils.files import atomic_file, is_regular, open_append, open_regular, write_atomic
from launcher.utils.system import is_disk_full_error


def claim_output(folder: Path, output: Path) -> None:
    """Write down that the file of answers is this run's from here on.

    Raises:
        JobError: another process made it meanwhile.
    """
    if output.exists() and not owns_output(folder, output):
        why = f"another process made this file while this run was working. All answers are kept in {folder}"
        raise JobError(f"job.output={output}: {why}: move the file away and type launch resume {folder.parent}")
    write_atomic(folder / CLAIM_FILE, str(output.absolute()))


_SYNC_S = 1.0
"""Seconds of answers that a power failure may lose; a killed process loses none."""
_MISSING = 2**64 - 1
_OFFSET_BITS = 44
"""Files of 16 TiB, and a million of them."""


class PartWriter:
    """Appends the answers of one rank.

    Args:
        path: the file; a last line that was cut is closed, so that the next answer begins on a new line.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_append(path)
        size = self._file.seek(0, os.SEEK_END)
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._file.write(b"\n")
        self._synced_at = time.monotonic()

    def append(self, number: int, answer: bytes, *, tokens: int = 0, is_error: bool = False) -> None:
        """Write an answer; it is out of this process when this returns.

        Args:
            number: of its record.
            answer: one line of JSON, without its end.
            tokens: how many were generated.
            is_error: whether it says what is wrong with the line.

        Raises:
            OSError: the disk is full or gone.
        """
        assert b"\n" not in answer, "an answer is one line"
        kind = b"e" if is_error else b"a"
        self._file.write(b"%d %d %s %08x %s\n" % (number, tokens, kind, zlib.crc32(answer), answer))
        self._file.flush()
        if time.monotonic() - self._synced_at > _SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Have everything survive a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.sync()
        self._file.close()


class PartIndex:
    """Where the answer to each record is: eight bytes for each, so millions fit.

    Args:
        folder: of the parts.
        size: records of the input.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self._places = array("Q", [_MISSING]) * size
        self._files: list[Path] = []
        self._read: dict[Path, int] = {}
        self.num_done = self.num_errors = self.num_tokens = 0
        self.first_error: int | None = None
        """Number of the first bad record."""

    def __contains__(self, number: int) -> bool:
        return self._places[number] != _MISSING

    @property
    def is_complete(self) -> bool:
        """Whether every record has its answer."""
        return self.num_done == len(self._places)

    def scan(self) -> None:
        """Take in what has been written since the last call, by whichever rank."""
        for path in sorted(self.folder.glob("*.part")):
            if path not in self._read:
                self._files.append(path)
                self._read[path] = 0
            if not is_regular(path):
                why = f"{path} is a link or not a regular file: a run never writes such a file"
                fix = f"Remove it, then type launch resume {self.folder.parent}"
                raise JobError(f"{why}. {fix}", exit_code=EXIT_BAD_INPUT)
            with open_regular(path) as file:
                file.seek(self._read[path])
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # it is being written, or was cut
                    self._take(path, self._read[path], line)
                    self._read[path] += len(line)

    def _take(self, path: Path, offset: int, line: bytes) -> None:
        found = parse_part_line(line)
        if found is None or not 0 <= found[0] < len(self._places) or found[0] in self:
            return
        number, tokens, is_error, _ = found
        self._places[number] = self._files.index(path) << _OFFSET_BITS | offset
        self.num_done += 1
        self.num_tokens += tokens
        if is_error:
            self.num_errors += 1
            self.first_error = min(number, number if self.first_error is None else self.first_error)

    def answers(self) -> Iterator[bytes]:
        """Yield the answers in the order of records, each with its end of line."""
        opened: list[BinaryIO] = [path.open("rb") for path in self._files]
        try:
            for place in self._places:
                assert place != _MISSING, "asked for before all are there"
                file = opened[place >> _OFFSET_BITS]
                file.seek(place & ((1 << _OFFSET_BITS) - 1))
                found = parse_part_line(file.readline())
                assert found is not None, "it was whole when it was indexed"
                yield found[3] + b"\n"
        finally:
            for file in opened:
                file.close()


def parse_part_line(line: bytes) -> tuple[int, int, bool, bytes] | None:
    """Return number, tokens, whether it failed, and the answer; ``None`` for a partial line."""
    parts = line.rstrip(b"\n").split(b" ", 4)
    if len(parts) != 5:
        return None
    number, tokens, kind, checksum, answer = parts
    try:
        if int(checksum, 16) != zlib.crc32(answer):
            return None
        return int(number), int(tokens), kind == b"e", answer
    except ValueError:
        return None


_LINES_PER_HEARTBEAT = 4096


def merge_parts(index: PartIndex, output: Path, *, heartbeat: Callable[[], None]) -> None:
    """Merge the parts into the output, which a rename creates at the end.

    Raises:
        JobError: the folder cannot be written, or is gone.
        OSError: the disk is full.
    """
    try:
        with atomic_file(output) as file:
            for number, answer in enumerate(index.answers()):
                file.write(answer)
                if number % _LINES_PER_HEARTBEAT == 0:
                    heartbeat()
    except OSError as error:
        folder = index.folder.absolute()
        if is_disk_full_error(error):
            raise
        why = f"cannot be written ({error.strerror or error}). All answers are kept in {folder}"
        fix = f"make {output.absolute().parent} writable, then type launch resume {folder.parent}"
        raise JobError(f"job.output={output}: {why}: {fix}") from error
