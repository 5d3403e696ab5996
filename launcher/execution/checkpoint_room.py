"""Whether the checkpoints that a run keeps fit on its disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from launcher.checkpoint.store import complete_checkpoints, silent
from launcher.config.run import BatchedJob, Run
from launcher.planning.planner import checkpoint_bytes
from launcher.protocol.rundir import RunDir
from launcher.utils.text import bytes_text


def room_warnings(run: Run, folder: Path, *, world_size: int) -> Iterator[str]:
    """Yield a warning if the disk has less room than the checkpoints that the run keeps.

    Args:
        run: the typed configuration.
        folder: the run directory, which need not exist.
        world_size: ranks in all.
    """
    job, policy = run.job, run.checkpoint
    if not isinstance(job, BatchedJob) or not job.saves or not run.backend.sees_files_of_hosts(str(folder)):
        return
    size = checkpoint_bytes(run)
    count = policy.most_at_once(job.num_steps(run, world_size=world_size) or None)
    if not size or not count:
        return
    own = complete_checkpoints(RunDir(folder).checkpoints, say=silent)  # of a run that is resumed: they are replaced
    free = _free_bytes(folder) + sum(sum(saved.manifest.files.values()) for saved in own)
    if free >= size * count:
        return
    option = "run.dir" if run.run.dir else "run.root"
    needed = f"{bytes_text(size * count)} ({count} of {bytes_text(size)}, the one being written among them)"
    fewer = "set checkpoint.keep=1 checkpoint.keep_best=false, or " if count > 2 else ""
    yield (
        f"checkpoints need up to {needed}, and the disk of {option} has {bytes_text(free)} for them. The run stops "
        f"at one that does not fit, and keeps the older ones: {fewer}set {option} to a larger disk"
    )


def _free_bytes(folder: Path) -> int:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    disk = os.statvfs(there)
    return disk.f_bavail * disk.f_frsize
