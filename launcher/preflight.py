"""Checks that look at this machine's disk and ports, before anything is started."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from launcher.backends.base import Backend
from launcher.checkpoint.resume import find, misfits
from launcher.config import Run
from launcher.errors import ConfigError
from launcher.jobs.benchmark import Measure
from launcher.jobs.train import Train
from launcher.parallel.zero import Zero
from launcher.rundir import RunDir


def preflight(run: Run, run_dir: Path, *, world_size: int) -> Iterator[ConfigError]:
    """Yield everything on this machine that stands against ``run`` on ``world_size`` ranks."""
    if not isinstance(run.job, Measure):
        yield from run.model.preflight()
        yield from run.data.preflight()
        yield from _refuse_checkpoint(run, run.job, RunDir(run_dir), world_size)
    yield from _refuse_unwritable("run.dir" if run.run.dir else "run.root", run_dir)
    yield from _refuse_occupied(run, run_dir)
    yield from _refuse_taken_port(run.backend)
    if isinstance(run.parallel, Zero) and run.parallel.nvme_path is not None:
        yield from _refuse_unwritable("parallel.nvme_path", Path(run.parallel.nvme_path))


def _refuse_checkpoint(run: Run, job: Train, run_dir: RunDir, world_size: int) -> Iterator[ConfigError]:
    try:
        saved = find(run.checkpoint.resume, run_dir)
    except ConfigError as error:
        yield error
        return
    if saved is None:
        return
    yield from misfits(saved, model=run.model, parallel=run.parallel, precision=run.precision, world_size=world_size)
    done = saved.manifest.step
    if done >= job.steps:
        why = f"{saved.folder} is of step {done} already"
        yield ConfigError("job.steps", job.steps, why=why, fix=f"set job.steps to more than {done}")


def _refuse_unwritable(option: str, folder: Path) -> Iterator[ConfigError]:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        yield ConfigError(option, folder, why=f"{existing} is a file", fix=f"set {option} to a folder")
    elif not os.access(existing, os.W_OK | os.X_OK) or _is_read_only(existing):
        yield ConfigError(option, folder, why=f"{existing} is not writable", fix=f"set {option} to a folder of yours")


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _refuse_occupied(run: Run, run_dir: Path) -> Iterator[ConfigError]:
    if run.checkpoint.resume == "auto" or not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    fix = "choose another, or set checkpoint.resume=auto to continue it"
    yield ConfigError("run.dir", run_dir, why="is not empty, and two runs never share a directory", fix=fix)


def _refuse_taken_port(backend: Backend) -> Iterator[ConfigError]:
    if backend.port == "auto":
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", backend.port))
    except OSError as error:
        why = f"cannot be used: {error.strerror}"
        yield ConfigError("backend.port", backend.port, why=why, fix="set backend.port=auto")


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
