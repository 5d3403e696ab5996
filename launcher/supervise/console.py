"""What the user sees while a run lasts: lines, and on a terminal a progress bar below them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Console:
    """Plain lines. A reader that goes away (``| head``) ends the printing, not the run.

    Args:
        stream: where to print.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def line(self, text: str) -> None:
        """Print one whole line."""
        if self._stream is None:
            return
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except UnicodeEncodeError:
            self.line(text.encode("ascii", "backslashreplace").decode())
        except (BrokenPipeError, OSError):
            self._stream = None

    def progress(self, step: int, total: int, numbers: Mapping[str, float]) -> None:
        """Show how far the run is; plain lines leave this to what rank 0 prints."""


class TerminalConsole(Console):
    """Lines above a progress bar.

    Args:
        stream: a terminal.
        bar: a started rich progress.
    """

    def __init__(self, stream: TextIO, bar: Progress) -> None:
        super().__init__(stream)
        self._bar = bar
        self._task: TaskID | None = None

    def line(self, text: str) -> None:
        """Print one whole line above the bar; colours that a rank prints stay."""
        from rich.text import Text

        self._bar.console.print(Text.from_ansi(text), soft_wrap=True)

    def progress(self, step: int, total: int, numbers: Mapping[str, float]) -> None:
        """Move the bar."""
        details = "  ".join(f"{name} {numbers[key]:{form}}" for key, name, form in _SHOWN if key in numbers)
        if self._task is None:
            self._task = self._bar.add_task("step", total=total, details="")
        self._bar.update(self._task, completed=step, total=total, details=details)


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
    with Progress(*columns, TextColumn("{task.fields[details]}"), console=terminal, transient=True) as bar:
        yield TerminalConsole(stream, bar)
