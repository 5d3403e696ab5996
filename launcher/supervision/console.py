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
    """Prints plain lines; a closed pipe (``| head``) or terminal does not end the run.

    Args:
        stream: where to print.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._reader_is_gone = False

    def line(self, text: str) -> None:
        """Print one whole line; of escape sequences, only colours are kept."""
        self._try(lambda: self._print(printable(text)))

    def progress(self, step: int, total: int, numbers: Mapping[str, float]) -> None:
        """Show progress: nothing here, because rank 0 prints its own lines."""

    def _print(self, text: str) -> None:
        self._stream.write(self._printable(text) + "\n")
        self._stream.flush()

    def _printable(self, text: str) -> str:
        """Return ``text`` with characters that the stream cannot encode escaped."""
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
        bar: a started rich progress without automatic refresh: its thread would write to a closed terminal.
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
        """Remove the bar."""
        self._try(self._bar.stop)

    def _print(self, text: str) -> None:
        from rich.text import Text

        self._bar.console.print(
            Text.from_ansi(self._printable(text)), soft_wrap=True
        )  # keeps the colours that a rank prints


_SHOWN = (("loss", "loss", ".4f"), ("tokens_per_s", "tokens/s", ",.0f"))


@contextmanager
def open_console(stream: TextIO = sys.stdout) -> Iterator[Console]:
    """Yield a console with a progress bar for a terminal, else one for plain lines."""
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
