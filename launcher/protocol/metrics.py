"""Write metrics.jsonl, the source of truth about a run: one JSON object a line, by rank 0.

    {"train/step": 3, "train/loss": 5.61, "time": 1753948800.5}

Names: train/step train/loss train/lr train/grad_norm train/tokens data/padding eval/loss perf/tokens_per_s perf/mfu
memory/peak_bytes time/<part>_s, and train/<source>/loss eval/<source>/loss of the sources of a mixture. ``time`` is in
seconds since 1970 and rises from line to line. A value that is not finite is written as ``null``: JSON has no NaN, and
a reader that wants numbers turns null into NaN automatically.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from launcher.protocol.results import parse_metrics_line
from launcher.utils.files import open_append, open_regular, write_atomic

_TICK_S = 1e-6
"""Two lines never carry the same time: a tracker uses it to find the lines that it has sent."""


class _LineWriter:
    """Appends lines that have left the process when ``record`` returns: SIGKILL loses none.

    Args:
        path: the file; created if need be.
        start_step: the step this run continues from. Lines of later steps come from a life of the run that ended
            before its next checkpoint: they move to ``<name>.discarded.jsonl`` and the file reads as one run.
    """

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        self._last_time = rewind(path, start_step)
        self._file = open_append(path)

    def _append(self, step: int, values: Mapping[str, float | str | None]) -> None:
        self._last_time = max(time.time(), self._last_time + _TICK_S)
        line = json.dumps({"train/step": step, **values, "time": self._last_time}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; every line is in it already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class MetricsWriter(_LineWriter):
    """Writes metrics.jsonl."""

    def record(self, step: int, **metrics: float) -> None:
        """Append one line for ``step`` (optimizer steps done so far).

        Raises:
            OSError: the disk is full or gone.
        """
        self._append(step, {name: value if math.isfinite(value) else None for name, value in metrics.items()})


class SampleWriter(_LineWriter):
    """Writes samples.jsonl, the texts that the model generated at evaluations."""

    def record(self, step: int, *, prompt: str, text: str) -> None:
        """Append one line for a text after ``step`` optimizer steps.

        Raises:
            OSError: the disk is full or gone.
        """
        self._append(step, {"prompt": prompt, "text": text})


def rewind(path: Path, step: int) -> float:
    """Move the lines after ``step``, and any that is cut, to ``<name>.discarded.jsonl``.

    The discarded lines are saved first and the file replaced in one rename, so a crash in between repeats the move
    but loses nothing.

    Returns:
        The time of the latest line, kept or not; 0 when there is none.
    """
    if not os.path.lexists(path):
        return 0.0
    with open_regular(path) as stored:
        content = stored.read()
    kept: list[bytes] = []
    discarded: list[bytes] = []
    latest = 0.0
    for line in content.splitlines():
        values = parse_metrics_line(line)
        if values is not None:
            latest = max(latest, values.get("time", 0.0))
        (discarded if values is None or values.get("train/step", 0) > step else kept).append(line + b"\n")
    if discarded:
        with open_append(path.with_name(f"{path.stem}.discarded{path.suffix}")) as file:
            file.writelines(discarded)
        write_atomic(path, b"".join(kept))
    elif kept and not content.endswith(b"\n"):
        write_atomic(path, b"".join(kept))
    return latest
