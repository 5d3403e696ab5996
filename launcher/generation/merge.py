"""The answers of all ranks in one file, in the order of the input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launcher.files import atomic_file
from launcher.generation.parts import Index

_BEAT_EVERY = 4096


def merge(index: Index, output: Path, *, beat: Callable[[], None]) -> None:
    """Write the output in one piece: until the rename that ends it there is none.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    with atomic_file(output) as file:
        for number, answer in enumerate(index.answers()):
            file.write(answer)
            if number % _BEAT_EVERY == 0:
                beat()
