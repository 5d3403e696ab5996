"""Resume from another program's checkpoint, on all ranks together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.checkpoint.manifest import CheckpointManifest, TrainingProgress, describe_checkpoint
from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.utils.files import read_json
from launcher.utils.progress import OnProgress, no_progress

if TYPE_CHECKING:
    from launcher.checkpoint.foreign.tensors import ForeignTensors
    from launcher.engines.base import Engine
    from launcher.engines.context import Context
    from launcher.protocol.foreign_files import ForeignCheckpoint


def restore_foreign(
    foreign: ForeignCheckpoint, context: Context, engine: Engine, *, on_progress: OnProgress = no_progress
) -> CheckpointManifest:
    """Load another program's checkpoint into the engine; return a manifest of where it stands.

    Each rank reads its own parts, converted as they are read. The run has drawn as many sequences as its own steps
    would have.

    Raises:
        JobError: it is damaged, of another model, or does not say how many steps were done; exit code 65.
    """
    from launcher.checkpoint.foreign.source import open_foreign
    from launcher.models.build import skeleton
    from launcher.models.foreign_state import describe_start, state_of_model

    run = context.run
    trains = run.batched_job.trains
    found = open_foreign(foreign, with_moments=trains)
    model = skeleton(run.model, attention=run.attention, transforms=getattr(run.job, "transforms", ()))
    state = state_of_model(model, found, foreign.folder)
    step = _step_of(foreign, found, needed=trains)
    state.tensors.on_progress = on_progress
    try:
        engine.load_shards(state.tensors)
    except (OSError, ValueError, KeyError) as error:
        why = f"{foreign.folder} does not hold this model and optimizer: {error}"
        raise JobError(why, exit_code=EXIT_BAD_INPUT) from error
    context.heartbeat.update("load")
    if context.is_main:
        taken = describe_start(state) if trains else "weights"
        print(f"continuing after step {step} of {foreign.folder} ({foreign.title}): {taken}", flush=True)
    batch = run.batched_job.batch(run, world_size=context.world_size).global_batch if trains else 0
    progress = TrainingProgress(step=step, sequences=step * batch)
    plan = read_json(context.run_dir.plan)
    return describe_checkpoint(run, progress, world_size=context.world_size, plan=plan)


def _step_of(foreign: ForeignCheckpoint, found: ForeignTensors, *, needed: bool) -> int:
    step = found.step if found.step is not None else found.optimizer_step()
    if step is None and needed:
        why = f"checkpoint.resume={foreign.folder}: nothing in it says how many steps were done"
        fix = f"set model.weights={foreign.folder} checkpoint.resume=none to start over from its weights"
        raise JobError(f"{why}; {fix}", exit_code=EXIT_BAD_INPUT)
    return step or 0
