"""What a run left behind: its metrics folded to their last values, and ``result.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from launcher.files import write_json
from launcher.rundir import RunDir

Status = Literal["completed", "failed", "preempted", "cancelled"]
"""How a run ended: all steps done, a rank or the launcher broke, told to stop and resumable, ended by the user."""


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every whole line of a ``metrics.jsonl``; a file that does not exist has none.

    A line that is no JSON object is passed over: only a writer killed inside a line leaves one, at the end.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            parsed = parse_line(line)
            if parsed is not None:
                yield parsed


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object on one line, or ``None`` where the line is cut or is something else."""
    try:
        value = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
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
