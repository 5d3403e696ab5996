"""How the benchmarks start a bare script and the launcher on the same work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness import BIN, step_times
from workload import Workload

HERE = Path(__file__).resolve().parent


def bare_step_times(work: Workload, script: str, *, folder: Path, zero_stage: int = 0) -> list[float]:
    """Start ``script`` by torchrun and return when each of its steps ended, in seconds."""
    metrics = folder / "metrics.jsonl"
    command = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={work.ranks}", str(HERE / script)]
    env = {
        "BENCH_METRICS": str(metrics),
        "BENCH_STEPS": str(work.steps),
        "BENCH_ZERO_STAGE": str(zero_stage),
        "OMP_NUM_THREADS": str(work.threads),
    }
    folder.mkdir(parents=True)
    return step_times(command, metrics=metrics, env=env)


def launcher_step_times(work: Workload, *overrides: str, folder: Path) -> list[float]:
    """Run the same work by the launcher and return when each of its steps ended, in seconds."""
    command = [sys.executable, "-m", "launcher", *work.overrides(), *overrides, f"run.dir={folder}"]
    return step_times(command, metrics=folder / "metrics.jsonl", env={})


def tokens_per_s(work: Workload, times: Sequence[float], *, skip: int) -> float:
    """Return tokens a second over all steps after the first ``skip``."""
    return work.tokens_per_step * (len(times) - skip) / (times[-1] - times[skip - 1])
