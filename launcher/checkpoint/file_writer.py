"""Write a large file past the page cache, and compute its checksum on the way.

``O_DIRECT`` saves the kernel's copy and its allocation of pages, which were most of the processor time of a save, and
leaves the page cache to the training data.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from launcher.checkpoint.manifest import WrittenFile, new_checksum

BLOCK_BYTES = 4 << 20
"""Written at once: a multiple of every device's sector, and enough for a disk at full speed."""


class FileWriter:
    """Writes a file in blocks.

    File systems without ``O_DIRECT`` are written through the page cache.

    Args:
        file: replaced if it is there.
        between_blocks: called after each block.

    Raises:
        OSError: the disk is full or gone; the error names the file.
    """

    def __init__(self, file: Path, *, between_blocks: Callable[[], None] = lambda: None) -> None:
        self._file, self._between_blocks = file, between_blocks
        self._checksum, self._num_bytes = new_checksum(), 0
        self._buffer = mmap.mmap(-1, BLOCK_BYTES)  # begins at a page, as O_DIRECT demands
        self._block, self._filled = np.frombuffer(self._buffer, dtype=np.uint8), 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(file, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(file, flags, 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)

    def write(self, data: NDArray[np.uint8]) -> None:
        """Append bytes."""
        done = 0
        while done < len(data):
            taken = data[done : done + BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            done += len(taken)
            if self._filled == BLOCK_BYTES:
                self._write_block()

    def finish(self) -> WrittenFile:
        """Write what is left, sync the file, and return its size and checksum."""
        self._use_page_cache()  # the rest is no multiple of a sector
        self._write_block()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._naming_the_file(error) from error
        return WrittenFile(num_bytes=self._num_bytes, checksum=self._checksum.hexdigest())

    def _write_block(self) -> None:
        block = memoryview(self._buffer)[: self._filled]
        self._checksum.update(block)
        done = 0
        while done < len(block):
            try:
                done += os.write(self._descriptor, block[done:])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._uses_direct_io:
                    raise self._naming_the_file(error) from error
                self._use_page_cache()  # a file system that takes the flag and then no block of this size
        self._num_bytes += self._filled
        self._filled = 0
        self._between_blocks()

    @property
    def _uses_direct_io(self) -> bool:
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_DIRECT)

    def _use_page_cache(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def _naming_the_file(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self._file))
