"""Passes of micro-batches through a pipeline: training schedules, and forward-only passes.

torch's V schedule has no forward-only mode (2.13 fails in it), and others have one fixed shape each; the forward-only
pass here takes any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from launcher.engines.loss import places_of_all

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from launcher.config.parallel.pipeline import PipelineScheduleName
    from launcher.data.dataloader import MicroBatch
    from launcher.engines.pipeline.stage import ModelChunk


_SINGLE_CHUNK = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}

_MULTI_CHUNK = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}

Metas = tuple[Tensor, Tensor]
"""Input and output of a chunk, without storage."""


def chunks_of_rank(schedule: PipelineScheduleName, *, rank: int, ranks: int, chunks: int) -> list[int]:
    """Return the chunks of a pipeline rank: every ``ranks``-th, or those of equal height in a V."""
    if schedule == "zbv":
        return [rank, 2 * ranks - 1 - rank]
    return [rank + lap * ranks for lap in range(chunks)]


def make_schedule(
    name: PipelineScheduleName,
    modules: Sequence[tuple[int, nn.Module, Metas]],
    *,
    count: int,
    micro_batches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
    group: ProcessGroup,
) -> Any:
    """Return torch's schedule for this rank.

    Gradients come out as sums, not divided by anything.

    The messages of a schedule have a fixed shape. A batch of another shape would be computed wrongly, and silently, so
    it needs a schedule of its own.

    Args:
        name: of the schedule.
        modules: this rank's chunks: number, module, and what goes in and out for one micro-batch.
        count: of all chunks.
        micro_batches: how many go through in a step.
        loss: of what the last chunk returns for a micro-batch, and its part of the target.
        device: where this rank computes.
        group: the ranks of this pipeline.
    """
    stages = [
        PipelineStage(module, number, count, device, input_args=into, output_args=out, group=group)
        for number, module, (into, out) in modules
    ]
    if name in _SINGLE_CHUNK:
        return _SINGLE_CHUNK[name](stages[0], micro_batches, loss_fn=loss, scale_grads=False)
    return _MULTI_CHUNK[name](stages, micro_batches, loss_fn=loss, scale_grads=False)


class PipelineSchedule:
    """Runs a schedule, which is rebuilt when the shape or the number of micro-batches changes.

    Args:
        own: this rank's chunks by number.
        schedule: by name.
        count: of all chunks.
        hidden_size: of the hidden states.
        device: where this rank computes.
        group: the ranks of this pipeline.
    """

    def __init__(
        self,
        own: Mapping[int, ModelChunk],
        *,
        schedule: PipelineScheduleName,
        count: int,
        hidden_size: int,
        device: torch.device,
        group: ProcessGroup,
    ) -> None:
        self._own, self._name, self._count, self._hidden_size = own, schedule, count, hidden_size
        self._device, self._group = device, group
        self._made_for: tuple[int, ...] = ()
        self._schedule: Any = None

    def train(self, micro_batches: Sequence[MicroBatch], *, factor: Tensor) -> Tensor:
        """Add the gradient of the summed loss times ``factor``, a scalar; return the loss.

        Returns:
            The loss summed over the labelled tokens, an fp64 scalar; 0 on ranks without the last chunk.
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
        """Return what chunks take beside their inputs: positions all of them, the last one labels."""
        options = {}
        positions = [batch.position_ids for batch in micro_batches if batch.position_ids is not None]
        if positions:
            assert len(positions) == len(micro_batches), "all micro-batches of a step are packed, or none"
            options["position_ids"] = torch.cat(positions).to(self._device)
        if self._count - 1 in self._own:
            options |= self._last_options(micro_batches)
            options["target"] = factor.float().expand(len(micro_batches))
        return options

    def _last_options(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        labels = [micro_batch.labels for micro_batch in micro_batches]
        options = {"labels": torch.cat(labels).to(self._device)}
        if (places := places_of_all(labels)) is not None:
            options["places"] = places.to(self._device)
        sources = [batch.sources for batch in micro_batches if batch.sources is not None]
        if sources:
            options["sources"] = torch.cat(sources).to(self._device)
        return options

    def _fit(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Rebuild the schedule, unless it has this number of micro-batches and this shape."""
        shapes = {tuple(micro_batch.input_ids.shape) for micro_batch in micro_batches}
        assert len(shapes) == 1, f"micro-batches of a step have one shape, not {shapes}"
        wanted = (len(micro_batches), *shapes.pop())
        if self._made_for == wanted:
            return
        self._schedule = make_schedule(
            self._name,
            [(number, chunk, self._metas(number, *wanted[1:])) for number, chunk in self._own.items()],
            count=self._count,
            micro_batches=wanted[0],
            loss=_weighted,
            device=self._device,
            group=self._group,
        )
        self._made_for = wanted

    def _metas(self, number: int, sequences: int, tokens: int) -> Metas:
        """Return input and output of a chunk for one micro-batch."""
        hidden = torch.empty(sequences, tokens, self._hidden_size, device="meta", requires_grad=True)
        into = torch.empty(sequences, tokens, dtype=torch.int64, device="meta") if number == 0 else hidden
        out = torch.empty(1, device="meta", requires_grad=True) if number == self._count - 1 else hidden
        return into, out


def _weighted(loss: Tensor, factor: Tensor) -> Tensor:
    return (loss * factor).sum()


ChunkCall = Callable[["ModelChunk", Tensor, int], Tensor]
"""Calls a chunk on its inputs for a micro-batch, whose number comes last."""


class PipelineForward:
    """Sends micro-batches from chunk to chunk.

    Each goes all the way before a rank begins the next, so with one chunk a rank all ranks are at work; with several,
    a rank waits for its next one. Every pair of ranks then talks in one order, which GPUs need.

    Args:
        own: this rank's chunks by number.
        owners: rank in ``group`` of each chunk.
        hidden_size: of the hidden states.
        device: where this rank computes.
        group: the ranks of this pipeline.
    """

    def __init__(
        self,
        own: Mapping[int, ModelChunk],
        *,
        owners: Sequence[int],
        hidden_size: int,
        device: torch.device,
        group: ProcessGroup,
    ) -> None:
        self.own, self.device, self.group, self._hidden_size = own, device, group, hidden_size
        self._owners: list[int] = [dist.get_global_rank(group, rank) for rank in owners]

    @property
    def last_owner(self) -> int:
        """Rank, among all, that has the last chunk."""
        return self._owners[-1]

    def forward(self, tokens: Sequence[Tensor], call: ChunkCall) -> list[Tensor]:
        """Return the last chunk's output for each micro-batch, on its rank; nothing elsewhere.

        Args:
            tokens: int64 of shape (sequences, tokens) for each micro-batch, on every rank.
            call: how a chunk is called; used under ``no_grad``.
        """
        here, sending, returned = dist.get_rank(), [], []
        for index, given in enumerate(tokens):
            state = given
            for number, chunk in sorted(self.own.items()):
                if number > 0 and self._owners[number - 1] != here:
                    state = torch.empty(*given.shape, self._hidden_size, device=self.device)
                    dist.recv(state, src=self._owners[number - 1], group=self.group)
                state = call(chunk, state, index)
                if chunk.last:
                    returned.append(state)
                elif self._owners[number + 1] != here:
                    sending.append((dist.isend(state, dst=self._owners[number + 1], group=self.group), state))
        for work, _ in sending:  # a tensor lives until it has gone
            work.wait()
        return returned
