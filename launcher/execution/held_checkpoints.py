"""Keep the checkpoints of other runs that a run loads, until its ranks have loaded them.

Ranks lock what they read, but a launcher chooses it seconds or, in a queue, hours before: the retention of the run that
wrote it could remove it in between.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from launcher.checkpoint.locks import CheckpointLocks
from launcher.checkpoint.manifest import read_manifest
from launcher.checkpoint.resume import find_checkpoint
from launcher.checkpoint.store import silent
from launcher.config.run import BatchedJob, Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir


def keep_checkpoints(run: Run, run_dir: RunDir, locks: CheckpointLocks) -> None:
    """Lock the checkpoints of other runs that ranks of ``run`` load.

    They are named as weights, adapter or tokenizer, or by ``checkpoint.resume``.

    What cannot be found is left to the checks of the run.
    """
    for _, value in run.paths():
        folder = Path(value).expanduser()
        for place in (folder, folder.parent):
            with contextlib.suppress(OSError, ValueError):  # another file may be called manifest.json
                read_manifest(place)
                locks.keep(place, say=silent)
    if not run.job.resumes or run.checkpoint.resume in ("none", "auto"):
        return
    with contextlib.suppress(ConfigError, OSError):
        while (saved := find_checkpoint(run.checkpoint.resume, run_dir, say=silent)) is not None:
            with contextlib.suppress(FileNotFoundError):  # its run has removed it, and has written a newer one
                locks.keep(saved.folder, say=silent)
                return


def loads_once(run: Run) -> bool:
    """Whether ranks read the checkpoints of other runs at their start only.

    A run that is restarted reads them again, and so do replicas of a server and the cases of a benchmark.
    """
    trains = isinstance(run.job, BatchedJob) and run.job.trains
    return trains and (run.backend.restarts_itself or run.backend.restarts == 0)
