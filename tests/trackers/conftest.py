"""A run directory with a real sidecar beside it; the test plays the agent and rank 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.config.compose import compose
from launcher.config.run import Run
from launcher.execution.prepare import prepare
from launcher.protocol.metrics import MetricsWriter
from launcher.protocol.plan import Plan
from launcher.protocol.results import read_metrics
from launcher.protocol.rundir import RunDir
from launcher.utils.files import write_json
from launcher.utils.schema import to_tree


@dataclass(frozen=True)
class Sidecar:
    """A sidecar that runs."""

    process: subprocess.Popen[str]
    run_dir: RunDir

    @property
    def family(self) -> list[psutil.Process]:
        """The processes below it: W&B's own."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def read_line(self) -> str:
        """Return the next line it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def finish(self, exit_code: int, *, timeout: float = 60) -> str:
        """Tell it that the run is over; return what else it printed."""
        output, _ = self.process.communicate(json.dumps({"exit_code": exit_code}) + "\n", timeout=timeout)
        return output

    @property
    def offline_folders(self) -> list[Path]:
        """Folders of offline runs, oldest first."""
        return sorted(self.run_dir.tracker("wandb").glob("offline-run-*"))


@dataclass(frozen=True)
class PlannedRun:
    """A run directory, as the launcher leaves it before it starts the agents."""

    run_dir: RunDir
    run: Run
    plan: Plan

    def record(self, first: int, last: int, *, resumed_at: int) -> None:
        """Write the metrics of some steps, as rank 0 does after resuming."""
        with MetricsWriter(self.run_dir.metrics, start_step=resumed_at) as writer:
            for step in range(first, last + 1):
                writer.record(step, **{"train/loss": 5 / step, "train/lr": 1e-3})

    def expected_history(self) -> list[dict[str, Any]]:
        """Return metrics.jsonl as W&B should hold it."""
        lines = list(read_metrics(self.run_dir.metrics))
        return [{**{k: v for k, v in line.items() if k != "time"}, "_timestamp": line["time"]} for line in lines]


Start = Callable[..., Sidecar]


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., PlannedRun]:
    """Plan a run with overrides in ``tmp_path/run``; again, to resume it."""

    def make(*words: str) -> PlannedRun:
        words = (f"run.dir={tmp_path / 'run'}", "checkpoint.resume=auto", *words)
        prepared = prepare(compose(words))
        run_dir = prepared.directory
        run_dir.path.mkdir(exist_ok=True)
        run_dir.snapshot.write_text(prepared.snapshot)
        write_json(run_dir.plan, to_tree(prepared.plan))
        return PlannedRun(run_dir=run_dir, run=prepared.run, plan=prepared.plan)

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the sidecar of a planned run as its agent would; what is left of it at the end is killed."""
    started: list[Sidecar] = []

    def run(planned: PlannedRun, kind: str = "wandb") -> Sidecar:
        (command,) = (each for each in planned.plan.hosts[0].sidecars if each.argv[-1] == kind)
        process = subprocess.Popen(
            [sys.executable, *command.argv[1:]],
            env={**os.environ, **command.env},
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(Sidecar(process=process, run_dir=planned.run_dir))
        return started[-1]

    yield run
    for sidecar in started:
        if sidecar.process.poll() is None:
            for process in [*sidecar.family, psutil.Process(sidecar.process.pid)]:
                process.kill()
        sidecar.process.communicate()


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of W&B's history without what W&B adds."""
    return {name: value for name, value in row.items() if name not in ("_step", "_runtime")}
