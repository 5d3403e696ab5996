"""The global batch of a run that resumes on another number of ranks."""

from __future__ import annotations

from dataclasses import replace

from launcher.checkpoint.store import SavedCheckpoint
from launcher.config.run import BatchedJob, Run
from launcher.errors import ConfigError


def keep_global_batch(run: Run, saved: SavedCheckpoint, *, world_size: int) -> Run:
    """Return a run with the global batch of its checkpoint, on any number of ranks.

    Micro-batches become smaller where their size does not divide the share of a rank; a batch that cannot be divided
    is left to the batch equation, which refuses it.
    """
    job, data = run.job, saved.manifest.data
    if not isinstance(job, BatchedJob) or not job.trains or data is None:
        return run
    try:
        ranks = run.parallel.data_parallel(world_size)
        if job.batch(run, world_size=world_size).global_batch == data.global_batch:
            return run
    except ConfigError:
        ranks = 0
    share, remainder = divmod(data.global_batch, ranks) if ranks else (0, 0)
    sizes = [size for size in range(1, job.micro_batch + 1) if share and not remainder and share % size == 0]
    filling = [size for size in sizes if share // size >= run.parallel.default_gradient_accumulation_steps]
    micro_batch = max(filling or sizes, default=job.micro_batch)
    changed = replace(job, global_batch=data.global_batch, micro_batch=micro_batch, gradient_accumulation_steps=None)
    return replace(run, job=changed)
