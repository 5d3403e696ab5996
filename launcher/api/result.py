"""What a run left, for scripts and notebooks."""

from __future__ import annotations

import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.protocol.loss_curve import draw_curve
from launcher.protocol.results import last_metrics, read_metrics
from launcher.protocol.rundir import RunDir
from launcher.runs.state import ELSEWHERE, RunState, read_run_state
from launcher.utils.files import read_object


@dataclass(frozen=True)
class Result:
    """What a run left: how it ended, its metrics, its losses as a picture, its files."""

    folder: Path
    """The run directory."""

    submit_code: int = 0
    """Exit code of the process that started the run; used if the run has written no result."""

    def __repr__(self) -> str:
        return f"Result({str(self.folder)!r}, status={self.status!r})"

    @property
    def exit_code(self) -> int:
        """The exit code of the run: 0 where it completed."""
        return int(self._state().result.get("exit_code", self.submit_code))

    @property
    def status(self) -> str:
        """How the run ended: ``completed``, ``failed``, ``preempted`` or ``cancelled``.

        Without a result: ``running``, ``submitted`` to a cluster, ``elsewhere`` (on machines out of reach), or ``lost``
        (ended without a result).
        """
        state = self._state()
        if state.result:
            return state.status
        if self.submit_code:
            return "cancelled" if self.submit_code == 128 + signal.SIGINT else "failed"
        is_queued = state.status == ELSEWHERE and state.session is not None and bool(state.session.job)
        return "submitted" if is_queued or state.session is None else state.status

    def _state(self) -> RunState:
        return read_run_state(RunDir(self.folder))

    @property
    def failure(self) -> dict[str, Any] | None:
        """The content of failure.json: host, rank, exit code, traceback, log; else ``None``."""
        try:
            return read_object(self.folder / "failure.json")
        except FileNotFoundError:
            return None

    @property
    def metrics(self) -> dict[str, float | None]:
        """The last value of each metric; ``None`` for one that was not finite."""
        return last_metrics(RunDir(self.folder).metrics)

    def rows(self) -> list[dict[str, float | None]]:
        """Return a row for each step: ``train/step`` and every metric that was recorded at it."""
        rows: dict[int, dict[str, float | None]] = {}
        for line in read_metrics(RunDir(self.folder).metrics):
            rows.setdefault(line["train/step"], {}).update(line)
        return [rows[step] for step in sorted(rows)]

    def table(self) -> Any:
        """Return :meth:`rows` as a pandas ``DataFrame``, indexed by step."""
        import pandas

        return pandas.DataFrame(self.rows() or {"train/step": []}).set_index("train/step")

    def curve(self) -> bytes:
        """Return the losses over the steps as a PNG."""
        drawn = RunDir(self.folder).curve
        if drawn.is_file():
            return drawn.read_bytes()
        prefix = "baseline/"
        found = {name: value for name, value in self.metrics.items() if name.startswith(prefix)}
        baselines = {name.removeprefix(prefix): value for name, value in found.items() if value is not None}
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "loss.png"
            draw_curve(RunDir(self.folder).metrics, picture, baselines=baselines)
            return picture.read_bytes()

    def _repr_png_(self) -> bytes | None:
        """Show the curve where a notebook shows the result; nothing without metrics."""
        return self.curve() if any(name.endswith("/loss") for name in self.metrics) else None
