"""How far the tokenisation of a data set is: a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from launcher.config.data.auto import DataSource, OpenFile
from launcher.config.data.builtin import BUILTIN_DATA
from launcher.config.data.formats import BadFile, open_bytes
from launcher.config.data.hf import LONGEST_LINE_BYTES
from launcher.config.data.rows import count_rows
from launcher.utils.text import counted, duration_text

_SAMPLED_BYTES = 1 << 20
_SAMPLED_FILES = 16


class TokenisingProgress:
    """Prints how much of a data set is tokenised, and how long the rest will take.

    A data set that is done within a second prints nothing.

    Args:
        amount: returns a number of rows or bytes as text.
        total: of them, about; ``None`` where it is not known.
        clock: seconds.
    """

    _FIRST_S, _EVERY_S, _SHORT_S = 2.0, 5.0, 1.0

    def __init__(
        self, amount: Callable[[int], str], *, total: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._amount, self._total, self._clock = amount, total, clock
        self._started = clock()
        self._next = self._started + self._FIRST_S
        self._done = self._tokens = 0

    def add(self, done: int, *, tokens: int) -> None:
        """Count what has been tokenised since the last call."""
        self._done += done
        self._tokens += tokens
        now = self._clock()
        if now < self._next:
            return
        self._next = now + self._EVERY_S
        elapsed_s = now - self._started
        left = ""
        of = self._amount(self._done)
        if self._total is not None and self._done < self._total:
            of += f" of about {self._amount(self._total)} ({self._done / self._total:.0%})"
            left = f", {duration_text(elapsed_s * (self._total / self._done - 1))} left" if self._done else ""
        rate = self._amount(round(self._done / elapsed_s))
        print(f"tokenising: {of}, {self._tokens:,} tokens, {rate}/s{left}", flush=True)

    def end(self, *, processes: int = 1) -> None:
        """Print what was done, where it took over a second."""
        elapsed_s = self._clock() - self._started
        if elapsed_s > self._SHORT_S:
            rate = self._amount(round(self._done / elapsed_s))
            how = f"{rate}/s" + (f" by {processes} processes" if processes > 1 else "")
            said = f"tokenised {self._amount(self._done)}, {self._tokens:,} tokens in {duration_text(elapsed_s)}"
            print(f"{said} ({how})", flush=True)


def rows_text(count: int) -> str:
    """Return a number of rows as text."""
    return counted(count, "row")


def estimate_rows(sources: Sequence[DataSource]) -> int | None:
    """Return about how many rows there are, from the beginnings of a few files.

    ``None`` where these do not say it: in compressed files, lists in JSON, and Arrow.
    """
    found = 0
    for source in sources:
        if source.files:
            sampled = [_rows_of(file) for file in source.files[:_SAMPLED_FILES]]
            known = sum(count for count in sampled if count is not None)
            if None in sampled or not known:
                return None
            num_bytes = sum(file.path.stat().st_size for file in source.files)
            of_sampled = sum(file.path.stat().st_size for file in source.files[:_SAMPLED_FILES])
            found += round(known * num_bytes / max(1, of_sampled))
        else:
            number = BUILTIN_DATA[source.name].num_rows
            if number is None:
                return None
            found += number
    return found


def _rows_of(file: OpenFile) -> int | None:
    """Return about how many rows a file has."""
    written = file.written
    if written.kind == "parquet":
        try:
            return count_rows(file.path, written, longest_line=LONGEST_LINE_BYTES)
        except BadFile:
            return None  # its rows are read later, where the place is named
    if written.kind == "text":
        return 1
    if written.compression or written.kind not in ("jsonl", "csv"):
        return None
    with open_bytes(file.path, "") as stream:
        start = stream.read(_SAMPLED_BYTES)
    return round(start.count(b"\n") * file.path.stat().st_size / max(1, len(start)))
