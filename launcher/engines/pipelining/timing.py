"""How long the parts of a model take: forward and backward of one micro-batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.engines.distributed import DTYPES
from launcher.engines.pipelining.cut import count_own_blocks, cut
from launcher.engines.pipelining.stage import Stretch
from launcher.models.build import lay_out

if TYPE_CHECKING:
    from launcher.context import Context

_WARM_UP, _TIMES = 2, 5


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the parts of a model cost, in parameters or in seconds."""

    blocks: Sequence[float]
    """Each block, in order."""
    first: float
    """What comes before the first block."""
    last: float
    """What follows the last one."""


def measured(context: Context, *, device: torch.device) -> tuple[float, float, float]:
    """Return seconds for one block, for what comes before the first and for what follows the last.

    Blocks are taken to be alike: one is measured. No more than one of the three is in memory at a time.
    """
    empty, one = (_seconds(context, range(num), number=1, device=device) for num in (0, 1))
    first, last = (_seconds(context, range(0), number=number, device=device) for number in (0, 2))
    return max(one - empty, 0.0), first, last


def _seconds(context: Context, keep: range, *, number: int, device: torch.device) -> float:
    """Return the median time of a stretch with blocks ``keep``: the first (0), a middle (1) or the last one (2)."""
    run = context.run
    model, builder = lay_out(run.model, seed=run.job.seed, attention=run.attention)
    cut(model, keep, first=number == 0, last=number == 2)
    builder.build_all()
    count_own_blocks(model, keep)
    stretch = Stretch(model.to(device), number=number, count=3, autocast=DTYPES[run.precision.compute])
    shape = (run.batched_job.micro_batch, run.batched_job.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    hidden = torch.zeros(*shape, model.config.hidden_size, device=device, requires_grad=True)
    times = []
    for _ in range(_WARM_UP + _TIMES):
        context.heartbeat.beat("load")
        started = _now(device)
        out = stretch(hidden if number else tokens, labels=tokens)
        if out.requires_grad:
            out.sum().backward()
        times.append(_now(device) - started)
    return statistics.median(times[_WARM_UP:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
