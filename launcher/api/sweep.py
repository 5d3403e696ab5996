"""What a sweep left, for scripts and notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.api.result import Result
from launcher.runs.sweeps import SweepResult, TrialResult, read_sweep


@dataclass(frozen=True)
class Sweep:
    """What the runs of a sweep left: their results, and the best one."""

    folder: Path
    """The directory of the sweep, which has a run directory for each combination."""

    @property
    def results(self) -> list[Result]:
        """The results of the runs, in the order of their start."""
        return [_result(trial) for trial in self._recorded().trials]

    @property
    def best(self) -> Result | None:
        """The completed run with the best value of the sweep's metric; ``None`` without one."""
        best = self._recorded().best
        return None if best is None else _result(best)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each run: the options in which it differs, its status and its metric."""
        recorded = self._recorded()
        return [
            {
                **dict(word.split("=", 1) for word in trial.overrides),
                "status": trial.status,
                recorded.metric: trial.value,
            }
            for trial in recorded.trials
        ]

    def table(self) -> Any:
        """Return :meth:`rows` as a pandas ``DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self.rows())

    def _recorded(self) -> SweepResult:
        return read_sweep(self.folder)


def _result(trial: TrialResult) -> Result:
    return Result(trial.run_dir.path, submit_code=trial.exit_code)
