"""What DeepSpeed's engines have in common once a step is taken: its result, and checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.engines.base import StepResult
from launcher.engines.distributed import ranks_with_nonfinite, sum_over_ranks
from launcher.engines.rng import load_rng, save_rng
from launcher.engines.unpickling import deepspeed_tensors_only, named
from launcher.errors import EXIT_BAD_INPUT, JobError

if TYPE_CHECKING:
    import torch

    from launcher.context import Context

_TAG = "deepspeed"


def step_result(
    engine: Any, own_sum: float, *, tokens: int, norm: float | None, preempted: bool, device: torch.device
) -> StepResult:
    """Return what all ranks make of a step that DeepSpeed has just taken.

    Args:
        engine: DeepSpeed's.
        own_sum: the loss summed over this rank's tokens.
        tokens: with a label in the global batch.
        norm: of the gradient, where DeepSpeed computes none.
        preempted: whether this rank has been asked to leave.
        device: of this rank.
    """
    skipped = not engine.was_step_applied()
    total, num_preempted = sum_over_ranks([own_sum, float(preempted)], device=device)
    loss = total / tokens if tokens else math.nan
    if norm is None and not skipped:
        norm = float(engine.get_global_grad_norm())
    return StepResult(
        loss=loss,
        grad_norm=None if skipped else norm,
        tokens=tokens,
        skipped=skipped,
        nonfinite_ranks=() if math.isfinite(loss) else ranks_with_nonfinite(own_sum, device=device),
        preempted=num_preempted > 0,
    )


def save_checkpoint(engine: Any, folder: Path, *, context: Context, device: torch.device) -> None:
    """Write DeepSpeed's checkpoint (weights, optimiser partitions, loss scale) and this rank's generators."""
    engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
    save_rng(folder, rank=context.rank, device=device)


def load_checkpoint(engine: Any, folder: Path, *, context: Context, device: torch.device) -> None:
    """Read what ``save_checkpoint`` wrote at the same world size, stage and cut.

    Raises:
        JobError: the folder holds no checkpoint of DeepSpeed, or objects that could run code; exit code 65.
    """
    with named(folder / _TAG), deepspeed_tensors_only():
        loaded, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    if loaded is None:
        raise JobError(f"{folder} does not hold a checkpoint that DeepSpeed reads", exit_code=EXIT_BAD_INPUT)
    load_rng(folder, rank=context.rank, device=device)
