"""The number of steps of a run that counts epochs, once its sequences are counted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.checkpoint.foreign.plan import foreign_to_resume
from launcher.checkpoint.resume import find_checkpoint
from launcher.checkpoint.store import silent

if TYPE_CHECKING:
    from launcher.config.job.train import Train
    from launcher.engines.context import Context


def with_epoch_steps(job: Train, context: Context, *, num_sequences: int) -> tuple[Train, Context]:
    """Return the job, and the context with it, whose ``steps`` make ``job.epochs``.

    A run that resumes with another batch takes as many steps as the sequences that are left need.

    Args:
        job: of the run; unchanged if it counts steps.
        context: of this rank.
        num_sequences: of the training split.
    """
    if job.epochs is None:
        return job, context
    resume, done, drawn = context.run.checkpoint.resume, 0, 0
    saved = None if foreign_to_resume(resume) else find_checkpoint(resume, context.run_dir, say=silent)
    if saved is not None and (data := saved.manifest.data) is not None:
        done, drawn = saved.manifest.step, data.sequences - data.skipped
    steps = job.steps_of_epochs(num_sequences, context.batch, done=done, drawn=drawn)
    if context.is_main:
        print(f"{job.epochs:g} epochs of {num_sequences:,} sequences are {steps:,} steps", flush=True)
    counted = replace(job, steps=steps)
    return counted, replace(context, run=replace(context.run, job=counted))
