"""Console of a run: lines and, on a terminal, a progress bar below them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from launcher.utils.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Console:
    """Plain lines. A reader that goes away (``| head``, a closed terminal) ends the printing, not the run.

    Args:
        stream: where to print.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._reader_is_gone = False

    def line(self, text: str) -> None:
        """Print one whole line, without the escape sequences of a rank but its colours."""
        self._try(lambda: self._print(printable(text)))

    def progress(self, step: int, total: int, numbers: Mapping[str, float]) -> None:
        """Show how far the run is; plain lines leave this to what rank 0 prints."""

    def _print(self, text: str) -> None:
        self._stream.write(self._printable(text) + "\n")
        self._stream.flush()

    def _printable(self, text: str) -> str:
        """Return what the stream can encode: a name of a file may hold any byte, a terminal any encoding."""
        encoding = self._stream.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _try(self, printing: Callable[[], None]) -> None:
        if self._reader_is_gone:
            return
        try:
            printing()
        except OSError:
            self._reader_is_gone = True


class TerminalConsole(Console):
    """Lines above a progress bar.

    Args:
        stream: a terminal.
        bar: a rich progress, started, that draws only when told to: a thread of its own could not be stopped from
            writing to a terminal that is gone.
    """

    def __init__(self, stream: TextIO, bar: Progress) -> None:
        super().__init__(stream)
        self._bar = bar
        self._task: TaskID | None = None

    def progress(self, step: int, total: int, numbers: Mapping[str, float]) -> None:
        """Move the bar."""
        details = "  ".join(f"{name} {numbers[key]:{form}}" for key, name, form in _SHOWN if key in numbers)
        if self._task is None:
            self._task = self._bar.add_task("step", total=total, details="")
        self._bar.update(self._task, completed=step, total=total, details=details)
        self._try(self._bar.refresh)

    def close(self) -> None:
        """Take the bar away."""
        self._try(self._bar.stop)

    def _print(self, text: str) -> None:
        from rich.text import Text

        self._bar.console.print(
            Text.from_ansi(self._printable(text)), soft_wrap=True
        )  # colours that a rank prints stay


_SHOWN = (("loss", "loss", ".4f"), ("tokens_per_s", "tokens/s", ",.0f"))


@contextmanager
def open_console(stream: TextIO = sys.stdout) -> Iterator[Console]:
    """Yield the console that suits ``stream``."""
    if not stream.isatty():
        yield Console(stream)
        return
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = RichConsole(file=stream, highlight=False)
    details = TextColumn("{task.fields[details]}")
    bar = Progress(*columns, details, console=terminal, transient=True, auto_refresh=False)
    bar.start()
    console = TerminalConsole(stream, bar)
    try:
        yield console
    finally:
        console.close()
