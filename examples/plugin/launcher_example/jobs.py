"""A job, and a tracker."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.config.run import Run
    from launcher.engines.context import Context
    from launcher.protocol.plan import Plan
    from launcher.protocol.rundir import RunDir
    from launcher_example.options import CountParameters


def count_parameters(job: CountParameters, context: Context) -> None:
    """Print the parameters, on rank 0."""
    shape = context.run.model.shape()
    if context.is_main and shape is not None:
        print(f"{context.run.model.name} has {shape.num_params:,} parameters", flush=True)
    context.heartbeat.update("done", 1)


class CsvRun:
    """Writes steps and losses to ``losses.csv``, in the process beside rank 0."""

    def __init__(self, run_dir: RunDir, run: Run, plan: Plan) -> None:
        self._file = (run_dir.path / "losses.csv").open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(("step", "loss"))

    def log(self, line: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl, where it has a loss."""
        if "train/loss" in line:
            self._writer.writerow((line["train/step"], line["train/loss"]))

    def finish(self, exit_code: int) -> None:
        """Close the file."""
        self._file.close()
