"""A progress bar over bytes, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


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
