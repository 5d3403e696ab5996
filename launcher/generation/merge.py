"""The answers of all ranks in one file, in the order of the input."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from launcher.files import fsync_folder
from launcher.generation.parts import Index

_BEAT_EVERY = 4096


def merge(index: Index, output: Path, *, beat: Callable[[], None]) -> None:
    """Write the output in one piece: until the rename that ends it there is none.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        for number, answer in enumerate(index.answers()):
            file.write(answer)
            if number % _BEAT_EVERY == 0:
                beat()
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(output)
    fsync_folder(output.parent)
