"""What a run left behind: its metrics folded to their last values, and ``result.json``."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from launcher.files import write_json
from launcher.rundir import RunDir
from launcher.runfiles import UnreadableFile, open_regular

Status = Literal["completed", "failed", "preempted", "cancelled"]
"""How a run ended: all steps done, a rank or the launcher broke, told to stop and resumable, ended by the user."""


_LONGEST_LINE = 1 << 20


def read_metrics(path: Path, *, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield every whole line of a ``metrics.jsonl``; a file that does not exist has none.

    A line that is no JSON object, or is longer than 1 MiB, is skipped: a writer killed inside a line leaves one.

    Args:
        path: the file.
        limit: bytes that it may have; ``None`` is for a file of this process's own run.

    Raises:
        OSError: it is larger, is a link or no regular file, or cannot be read.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        if limit is not None and os.fstat(file.fileno()).st_size > limit:
            raise UnreadableFile(errno.EFBIG, f"is larger than {limit:,} bytes", str(path))
        is_rest = False  # of a line that is longer than any a run writes
        for line in iter(lambda: file.readline(_LONGEST_LINE), b""):
            parsed = None if is_rest else parse_line(line)
            is_rest = not line.endswith(b"\n")
            if parsed is not None:
                yield parsed


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object on one line, or ``None`` where the line is cut or is something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return None
    return value if isinstance(value, dict) else None


def fold_metrics(path: Path) -> dict[str, float | None]:
    """Return the last value of each metric; ``None`` stands for one that was not finite."""
    last: dict[str, float | None] = {}
    for line in read_metrics(path):
        last.update(line)
    return last


def write_result(run_dir: RunDir, *, status: Status, exit_code: int, run_id: str) -> None:
    """Write ``result.json`` atomically, with the last value of every metric."""
    metrics = fold_metrics(run_dir.metrics)
    write_json(run_dir.result, {"status": status, "exit_code": exit_code, "run_id": run_id, "metrics": metrics})
