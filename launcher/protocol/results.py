"""Records that a run leaves: metrics.jsonl, result.json and benchmark.json."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.protocol.rundir import RunDir
from launcher.utils.files import UnreadableFile, open_regular, read_object, write_json

RunStatus = Literal["completed", "failed", "preempted", "cancelled"]
"""How a run ended: completed, failed, preempted (resumable) or cancelled by the user."""
NUM_STEPS = "train/num_steps"
"""Metric: steps of a run that counts epochs, which its plan may not know."""
STOPPED_EARLY = "train/stopped_early"
"""Metric: the step after which a run stopped because its evaluations no longer improved."""
_MAX_LINE_BYTES = 1 << 20


def read_metrics(path: Path, *, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield every whole line of a ``metrics.jsonl``; a file that does not exist has none.

    A line that is not a JSON object, or is longer than 1 MiB, is skipped: a writer killed inside a line leaves one.

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
        for line in iter(lambda: file.readline(_MAX_LINE_BYTES), b""):
            parsed = None if is_rest else parse_metrics_line(line)
            is_rest = not line.endswith(b"\n")
            if parsed is not None:
                yield parsed


def parse_metrics_line(line: bytes) -> dict[str, Any] | None:
    """Return the object on one line, or ``None`` where the line is cut or is something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return None
    return value if isinstance(value, dict) else None


def last_metrics(path: Path) -> dict[str, float | None]:
    """Return the last value of each metric; ``None`` for one that was not finite."""
    last: dict[str, float | None] = {}
    for line in read_metrics(path):
        last.update(line)
    return last


def write_result(run_dir: RunDir, *, status: RunStatus, exit_code: int, run_id: str) -> None:
    """Write ``result.json`` atomically, with the last value of every metric."""
    metrics = last_metrics(run_dir.metrics)
    write_json(run_dir.result, {"status": status, "exit_code": exit_code, "run_id": run_id, "metrics": metrics})


Samples = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord:
    """One run of a benchmark."""

    kind: str
    """Which benchmark."""
    options: Mapping[str, Any]
    """Options of the benchmark."""
    machine: Mapping[str, str]
    cases: Mapping[str, Mapping[str, Samples]]
    """Values by quantity in the order of rounds, by name of the case."""
    findings: tuple[str, ...]
    """Its findings as sentences."""

    def rows(self) -> list[tuple[str, str, float, float, float, int]]:
        """Return case, quantity, median, least, most and number of values, a row each."""
        import statistics  # with fractions 3 ms, and every plan imports this module

        return [
            (case, quantity, statistics.median(values), min(values), max(values), len(values))
            for case, quantities in self.cases.items()
            for quantity, values in quantities.items()
        ]


def read_benchmark_record(path: Path) -> BenchmarkRecord:
    """Return the content of a ``benchmark.json``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not the result of a benchmark; says what is wrong.
    """
    try:
        tree = read_object(path)
        options = dict(tree["benchmark"])
        cases = {
            str(name): {str(key): tuple(map(float, values)) for key, values in quantities.items()}
            for name, quantities in tree["cases"].items()
        }
        found = BenchmarkRecord(
            kind=str(options.pop("kind")),
            options=options,
            machine={str(key): str(value) for key, value in tree["machine"].items()},
            cases=cases,
            findings=tuple(map(str, tree["findings"])),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is not a valid benchmark.json ({type(error).__name__}: {error})") from error
    if not all(values for quantities in cases.values() for values in quantities.values()):
        raise ValueError("holds a quantity without a value")
    return found
