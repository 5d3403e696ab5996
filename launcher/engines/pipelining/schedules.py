"""torch's pipeline schedules by our names, and which stretches of the model a rank has under each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from launcher.parallel.pipeline import ScheduleName

_ONE_STRETCH = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_MANY = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}

Metas = tuple[Tensor, Tensor]
"""What goes into a stretch and what comes out, without storage."""


def own_stretches(schedule: ScheduleName, *, rank: int, ranks: int, chunks: int) -> list[int]:
    """Return the stretches of a rank of the pipeline: every ``ranks``-th, or those at the same height of a V."""
    if schedule == "zbv":
        return [rank, 2 * ranks - 1 - rank]
    return [rank + lap * ranks for lap in range(chunks)]


def make_schedule(
    name: ScheduleName,
    modules: Sequence[tuple[int, nn.Module, Metas]],
    *,
    count: int,
    micro_batches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
    group: ProcessGroup,
) -> Any:
    """Return torch's schedule for this rank; gradients come out as sums, not divided by anything.

    What a schedule sends has one shape for good. A batch of another shape would be computed wrongly, and silently, so
    it needs a schedule of its own.

    Args:
        name: of the schedule.
        modules: this rank's stretches: number, module, and what goes in and out for one micro-batch.
        count: of all stretches.
        micro_batches: how many go through in a step.
        loss: of what the last stretch returns for a micro-batch, and its part of the target.
        device: where this rank computes.
        group: the ranks of this pipeline.
    """
    stages = [
        PipelineStage(module, number, count, device, input_args=into, output_args=out, group=group)
        for number, module, (into, out) in modules
    ]
    if name in _ONE_STRETCH:
        return _ONE_STRETCH[name](stages[0], micro_batches, loss_fn=loss, scale_grads=False)
    return _MANY[name](stages, micro_batches, loss_fn=loss, scale_grads=False)
