"""A training run's own use of checkpoints: where it starts, and how all ranks save together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.checkpoint.manifest import describe
from launcher.checkpoint.resume import find
from launcher.checkpoint.store import quiet
from launcher.errors import JobError
from launcher.files import read_json

if TYPE_CHECKING:
    from launcher.checkpoint.manifest import Manifest
    from launcher.checkpoint.store import CheckpointStore
    from launcher.context import Context
    from launcher.engines.base import Engine


def restore(store: CheckpointStore, context: Context, engine: Engine) -> int:
    """Load what the run continues from, on every rank; return the steps already done.

    Raises:
        ConfigError: the folder named by ``checkpoint.resume`` is gone since the plan was made.
    """
    from launcher.engines.distributed import barrier

    if context.is_main:
        store.clean()
    barrier()
    saved = find(context.run.checkpoint.resume, context.run_dir, say=print if context.is_main else quiet)
    if saved is None:
        return 0
    engine.load(saved.folder)
    if context.is_main:
        print(f"continuing after step {saved.manifest.step} of {saved.folder}", flush=True)
    return saved.manifest.step


def save(store: CheckpointStore, context: Context, engine: Engine, *, step: int, held_out_loss: float | None) -> None:
    """Write the checkpoint of ``step``, which exists once every rank's part is there; all ranks return together.

    Raises:
        JobError: the ranks do not share the run directory; nothing was saved that would look like a checkpoint.
    """
    from launcher.engines.distributed import barrier, ranks_where

    if context.is_main:
        store.begin(step)
    barrier()
    if blind := ranks_where(not store.sees(step), device=engine.device):
        raise JobError(
            f"no checkpoint of step {step} was written: rank {', '.join(map(str, blind))} does not see "
            f"{store.pending(step)}: set run.root to a folder that all hosts share"
        )
    engine.save(store.pending(step))
    barrier()
    if context.is_main:
        manifest = manifest_of(context, step=step, held_out_loss=held_out_loss)
        print(f"checkpoint {store.commit(manifest).folder}", flush=True)
    barrier()  # a rank that leaves now, with all others, leaves a whole checkpoint


def manifest_of(context: Context, *, step: int, held_out_loss: float | None) -> Manifest:
    """Return what is to be written of the run's checkpoint of ``step``; the store adds the files."""
    plan = read_json(context.run_dir.plan)
    return describe(
        model=context.run.model,
        parallel=context.run.parallel,
        precision=context.run.precision,
        world_size=context.world_size,
        step=step,
        eval_loss=held_out_loss,
        run_id=plan["run_id"],
        run_hash=plan["run_hash"],
    )
