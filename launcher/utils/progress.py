"""Progress over bytes: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from launcher.utils.text import bytes_text

_LINE_EVERY_S = 5.0

OnProgress = Callable[[int, int], None]
"""Takes the bytes done and those in all."""


def no_progress(done: int, total: int) -> None:
    """Take no notice."""


class ProgressLines:
    """Prints how far something is, a line every few seconds; none for what is done sooner.

    Args:
        description: what is done, before the numbers.
        clock: returns seconds.
    """

    def __init__(self, description: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._description, self._clock = description, clock
        self._printed_at = clock()

    def update(self, done: int, total: int) -> None:
        """Note the bytes done, of all."""
        now = self._clock()
        if now - self._printed_at < _LINE_EVERY_S:
            return
        self._printed_at = now
        done = min(done, total)
        percent = f" ({100 * done // total} %)" if total else ""
        print(f"{self._description}: {bytes_text(done)} of {bytes_text(total)}{percent}", flush=True)


@contextmanager
def byte_progress(description: str, total: int, *, stream: TextIO = sys.stderr) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes done since its last call.

    Args:
        description: what is done, before the bar.
        total: bytes in all.
        stream: where the bar is drawn if it is a terminal; it is removed at the end.
    """
    if not stream.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
