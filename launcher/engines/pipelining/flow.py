"""Forward and backward passes of a step through the stretches of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from launcher.engines.pipelining.schedules import Metas, make_schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from launcher.data.loader import MicroBatch
    from launcher.engines.pipelining.stage import Stretch
    from launcher.parallel.pipeline import ScheduleName


class Flow:
    """Runs a schedule, made anew whenever shape or number of micro-batches change.

    Args:
        own: this rank's stretches by number.
        schedule: by name.
        count: of all stretches.
        width: of the hidden states.
        device: where this rank computes.
        group: the ranks of this pipeline.
    """

    def __init__(
        self,
        own: Mapping[int, Stretch],
        *,
        schedule: ScheduleName,
        count: int,
        width: int,
        device: torch.device,
        group: ProcessGroup,
    ) -> None:
        self._own, self._name, self._count, self._width = own, schedule, count, width
        self._device, self._group = device, group
        self._made_for: tuple[int, ...] = ()
        self._schedule: Any = None

    def train(self, micro_batches: Sequence[MicroBatch], *, factor: Tensor) -> Tensor:
        """Add the gradient of the summed loss times ``factor``, a scalar; return the loss as this rank knows it.

        Returns:
            The loss summed over the labelled tokens, an fp64 scalar; 0 on ranks without the last stretch.
        """
        self._fit(micro_batches)
        losses = self._schedule.step(*self._args(micro_batches), **self._options(micro_batches, factor))
        if losses is None:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return cast("Tensor", losses.detach().double().sum())

    def _args(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, ...]:
        if 0 not in self._own:
            return ()
        return (torch.cat([micro_batch.input_ids for micro_batch in micro_batches]).to(self._device),)

    def _options(self, micro_batches: Sequence[MicroBatch], factor: Tensor) -> dict[str, Tensor]:
        if self._count - 1 not in self._own:
            return {}
        labels = torch.cat([micro_batch.labels for micro_batch in micro_batches]).to(self._device)
        return {"labels": labels, "target": factor.float().expand(len(micro_batches))}

    def _fit(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Make the schedule anew, unless it is for as many micro-batches of this shape."""
        shapes = {tuple(micro_batch.input_ids.shape) for micro_batch in micro_batches}
        assert len(shapes) == 1, f"micro-batches of a step have one shape, not {shapes}"
        wanted = (len(micro_batches), *shapes.pop())
        if self._made_for == wanted:
            return
        self._schedule = make_schedule(
            self._name,
            [(number, stretch, self._metas(number, *wanted[1:])) for number, stretch in self._own.items()],
            count=self._count,
            micro_batches=wanted[0],
            loss=_weighed,
            device=self._device,
            group=self._group,
        )
        self._made_for = wanted

    def _metas(self, number: int, sequences: int, tokens: int) -> Metas:
        """Return what goes into a stretch for one micro-batch, and what comes out."""
        hidden = torch.empty(sequences, tokens, self._width, device="meta", requires_grad=True)
        into = torch.empty(sequences, tokens, dtype=torch.int64, device="meta") if number == 0 else hidden
        out = torch.empty(1, device="meta", requires_grad=True) if number == self._count - 1 else hidden
        return into, out


def _weighed(loss: Tensor, factor: Tensor) -> Tensor:
    return (loss * factor).sum()
