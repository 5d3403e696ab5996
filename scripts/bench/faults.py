"""The fault matrix: break every part of a run in every way, and see what each launcher makes of it.

    faults.py --out faults.json                        everything; continues where it was stopped
    faults.py --out faults.json --launchers ours --only "3 hosts, agent"
    faults.py --out faults.json --table                the results as Markdown

A cell is a run on one to three hosts (namespaces of this machine), whose ranks all-reduce in a loop, and a second run
next to it. The script injects a fault into one process or host, and records the processes left after ten seconds, the
time until all had exited, the exit code, and the cause that the launcher named. No cell is retried.

Needs root and the packages of scripts/lab; pdsh for deepspeed.
"""

from __future__ import annotations

import argparse
import json
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from faults_cells import LAUNCHERS, Cell, matrix
from faults_lab import LabError, missing
from faults_run import StartTroubleError
from faults_table import table
from faults_trial import Worker, tree_of
from harness import describe_machine

from launcher.utils.files import write_json


class Book:
    """The results so far, on disk after every cell."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path.absolute(), threading.Lock()
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.machine: str = kept.get("machine", "")
        self.cells: dict[str, dict[str, Any]] = kept.get("cells", {})

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._path.parent

    def has(self, cell: Cell) -> bool:
        """Return whether a cell has been carried out; one that did not start was not."""
        return "trouble" not in self.cells.get(cell.name, {"trouble": ""})

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Write one result down."""
        with self._lock:
            self.cells[name] = entry
            write_json(self._path, {"machine": self.machine, "cells": self.cells})
            done = "right" if entry.get("is_right") else "TROUBLE" if "trouble" in entry else "WRONG"
            said = {key: entry[key] for key in ("gone_s", "exit_code", "named") if key in entry}
            print(f"{done}: {name}: {said or entry}", flush=True)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time")
    parser.add_argument("--launchers", default=",".join(LAUNCHERS))
    parser.add_argument("--only", action="append", default=[], help="cells whose name holds this; may be repeated")
    parser.add_argument("--table", action="store_true", help="print what is known and carry out nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    # what is ignored here (nohup, a shell's &) would be ignored by everything that is started
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    book = Book(arguments.out)
    if not arguments.table:
        launchers = arguments.launchers.split(",")
        chosen = [cell for cell in matrix() if cell.launcher in launchers and _matches(cell, arguments.only)]
        if any(cell.num_hosts > 1 for cell in chosen) and (why := missing()) is not None:
            sys.exit(f"faults: {why}")
        book.machine = describe_machine("torch", "deepspeed")
        _carry_out([cell for cell in chosen if not book.has(cell)], book, num_workers=arguments.workers)
    print(f"{book.machine}\n\n{table(book.cells)}")


def _end(number: int, _frame: FrameType | None) -> None:
    """Exit, and take the time to clean up: a second signal does not interrupt that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit("faults: received a signal to end")


def _matches(cell: Cell, patterns: Sequence[str]) -> bool:
    return not patterns or any(pattern in cell.name for pattern in patterns)


def _carry_out(cells: Sequence[Cell], book: Book, *, num_workers: int) -> None:
    """Carry out all cells, several at a time; directories of those that go wrong are kept, beside the results."""
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    folder = Path(tempfile.mkdtemp(prefix="runs-", dir=book.folder))

    def work(number: int) -> None:
        with Worker(number, folder) as worker, suppress(queue.Empty):
            while True:
                cell = waiting.get_nowait()
                try:
                    book.add(cell.name, tree_of(worker.carry_out(cell)))
                except (StartTroubleError, LookupError, LabError, TimeoutError) as trouble:
                    book.add(cell.name, {"trouble": str(trouble)})

    try:
        with ThreadPoolExecutor(num_workers) as pool:
            try:
                for ended in as_completed(pool.submit(work, number) for number in range(num_workers)):
                    ended.result()
            finally:  # on a signal, clean up after the running cells, and start no other
                with suppress(queue.Empty):
                    while True:
                        waiting.get_nowait()
    finally:
        with suppress(OSError):  # what went wrong is in it
            folder.rmdir()


if __name__ == "__main__":
    main()
