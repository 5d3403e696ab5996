"""The logs of a run, read while they grow and before they exist."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from launcher.protocol.rundir import RunDir
from launcher.utils.files import open_regular
from launcher.utils.logs import LineSplitter

AGENT = "agent"
_CHUNK = 1 << 18
_MOST_BACK = 1 << 28
"""Bytes at the end of a file in which the last lines are searched."""


class GrowingLog:
    """One log file; each read continues where the previous one ended.

    Args:
        path: ``<host>.<who>.log``, where ``who`` is a rank or ``agent``.
        last: begin with this many last lines of the file; ``None`` begins with the first line.
    """

    def __init__(self, path: Path, *, last: int | None) -> None:
        self.path = path
        self.host, self.who = host_and_who(path)
        self._fault = ""
        try:
            self._offset = 0 if last is None else start_of_last_lines(path, last)
        except OSError:
            self._offset = 0  # the first read returns the reason
        self._splitter = LineSplitter()

    def read(self) -> list[str]:
        """Return new whole lines, a limited number at a time; none if there are none.

        For a file that is not read (a link, a FIFO), the only line is the reason.
        """
        try:
            with open_regular(self.path, inside=self.path.parent.parent) as file:
                file.seek(self._offset)
                data = file.read(_CHUNK)
        except OSError as error:
            before, self._fault = self._fault, f"({self.path.name} {error.strerror})"
            return [] if before == self._fault else [self._fault]
        self._offset += len(data)
        return self._splitter.feed(data)

    def rest(self) -> list[str]:
        """Return the last line if it has no line end."""
        return self._splitter.rest()


class RunLogs:
    """The selected logs of a run, including those that do not exist yet.

    Args:
        run_dir: of the run.
        rank: only this one; ``None`` means all.
        host: only on this one.
        agents: the logs of host agents instead of those of ranks.
        last: begin with this many last lines of each log; ``None`` begins with the first line.
    """

    def __init__(self, run_dir: RunDir, *, rank: int | None, host: str | None, agents: bool, last: int | None) -> None:
        self._folder, self._rank, self._host, self._agents = run_dir.logs, rank, host, agents
        self._last = last
        self._known: dict[Path, GrowingLog] = {}

    def read(self) -> Iterator[str]:
        """Yield all new lines, log by log, each with the name of who wrote it."""
        for path in sorted(self._folder.glob("*.log"), key=_order):
            if path not in self._known and self._wants(path):
                self._known[path] = GrowingLog(path, last=self._last)
        self._last = None  # a log that is created from now on is shown from its first line
        for log in self._known.values():
            while lines := log.read():
                yield from (_named(log, line) for line in lines)

    def rest(self) -> Iterator[str]:
        """Yield the lines that will never end, once the run is over."""
        for log in self._known.values():
            yield from (_named(log, line) for line in log.rest())

    def names(self) -> list[str]:
        """Return the logs that exist so far, as ``host:rank``."""
        return [":".join(map(str, host_and_who(path))) for path in sorted(self._folder.glob("*.log"), key=_order)]

    def _wants(self, path: Path) -> bool:
        host, who = host_and_who(path)
        is_wanted = who == AGENT if self._agents else isinstance(who, int) and self._rank in (None, who)
        return is_wanted and self._host in (None, host)


def host_and_who(path: Path) -> tuple[str, int | str]:
    """Return host and rank, or host and ``agent``, of a log file."""
    host, _, who = path.name.removesuffix(".log").rpartition(".")
    return host, int(who) if who.isascii() and who.isdigit() else who


def start_of_last_lines(path: Path, count: int) -> int:
    """Return the offset of the last ``count`` lines of a file, which is not read whole."""
    with open_regular(path, inside=path.parent.parent) as file:
        end = file.seek(0, os.SEEK_END)
        if count == 0:
            return end
        wanted = count + 1  # the line ends to skip; the last one ends the file
        position = end
        while position > max(0, end - _MOST_BACK):
            begin = max(0, position - _CHUNK)
            file.seek(begin)
            block = file.read(position - begin)
            if position == end and not block.endswith(b"\n"):
                wanted -= 1
            while (found := block.rfind(b"\n")) >= 0:
                wanted -= 1
                if wanted <= 0:
                    return begin + found + 1
                block = block[:found]
            position = begin
    return position


def _named(log: GrowingLog, line: str) -> str:
    return f"{log.host}:{log.who} | {line}"


def _order(path: Path) -> tuple[int, int | str, str]:
    """Sort by rank; agents come last."""
    host, who = host_and_who(path)
    return (0, who, host) if isinstance(who, int) else (1, who, host)


_TAIL_BYTES = 1 << 16


def tail_lines(path: Path, *, inside: Path | None = None) -> Iterator[bytes]:
    """Yield the whole lines in the last 64 KiB of a file; none if it does not exist.

    Raises:
        OSError: it is a link or not a regular file, or cannot be read; see ``open_regular``.
    """
    try:
        with open_regular(path, inside=inside) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).splitlines()
    except FileNotFoundError:
        return
    yield from lines[1:] if size > _TAIL_BYTES else lines
