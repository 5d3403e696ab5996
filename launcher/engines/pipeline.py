"""Pipeline parallelism on torch.distributed.pipelining, alone or with replicas or shards of each stage beside it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from launcher.engines.base import Engine, StepResult, nobody_asks
from launcher.engines.distributed import TokenCount, choose_device, connect, disconnect, num_labels
from launcher.engines.held import torch_state
from launcher.engines.mesh import dimensions, mesh_of
from launcher.engines.pipelining.build import build_stretch, choose_cut
from launcher.engines.pipelining.flow import Flow
from launcher.engines.pipelining.generate import Decoder
from launcher.engines.pipelining.reduce import sum_gradients
from launcher.engines.pipelining.relay import Relay
from launcher.engines.pipelining.schedules import own_stretches
from launcher.engines.pipelining.shard import free_gathered, shard
from launcher.engines.pipelining.state import copy_to_twins, named_state
from launcher.engines.pipelining.tied import Tied
from launcher.engines.rng import load_rng, save_rng
from launcher.engines.sharded_state import load_tensors, save_tensors
from launcher.engines.unpickling import named
from launcher.engines.update import Update
from launcher.engines.weights import whole_parameters
from launcher.files import read_json, write_json
from launcher.parallel.pipeline import Pipeline, owner_of

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.data.loader import MicroBatch
    from launcher.parallel.base import StateBytes
    from launcher.training.clock import Clock


class PipelineEngine(Engine):
    """This rank's stretches of the model, fed by a schedule; fp32 master weights, autocast in the run's precision."""

    def __init__(self, context: Context, clock: Clock) -> None:
        run, parallel, degrees = context.run, context.run.parallel, context.degrees
        assert isinstance(parallel, Pipeline), "the strategy chose this engine"
        self._clock, self._rank, self._copies = clock, context.rank, degrees.copies
        self._shards = degrees.shard
        self.device = choose_device(context.local_rank)
        connect(context, self.device)
        mesh = mesh_of(degrees, device=self.device)
        replicas, shards = dimensions(mesh, "data"), dimensions(mesh, "shard")
        self._group = mesh["pipeline"].get_group()
        self._replicas = replicas.get_group() if replicas is not None else None
        count = degrees.pipeline * parallel.num_chunks
        self._owners = [owner_of(parallel.schedule, number, ranks=degrees.pipeline) for number in range(count)]
        self._cut = choose_cut(context, count=count, by_time=parallel.balance == "time", device=self.device)
        here = dist.get_rank(self._group)
        numbers = own_stretches(parallel.schedule, rank=here, ranks=degrees.pipeline, chunks=parallel.num_chunks)
        self._own = {number: build_stretch(context, self._cut, number, device=self.device) for number in numbers}
        if shards is not None:
            for stretch in self._own.values():
                shard(stretch, shards)
        self.module = nn.ModuleList(self._own.values())
        self._tied = Tied(
            list(self._own.values()),
            self._cut.tied,
            group=self._group,
            ends=(self._owners[0], self._owners[-1]),
            share=shards is None,
        )
        self._update = Update(
            list(self._own.values()),
            run,
            device=self.device,
            stages=self._group,
            counted_elsewhere=self._tied.counted_elsewhere,
        )
        self._relay = Relay(
            self._own, owners=self._owners, width=self._cut.width, device=self.device, group=self._group
        )
        self._flow = Flow(
            self._own,
            schedule=parallel.schedule,
            count=count,
            width=self._cut.width,
            device=self.device,
            group=self._group,
        )
        torch.manual_seed(run.job.seed + context.rank)  # no two ranks drop the same activations

    def step(
        self, micro_batches: Sequence[MicroBatch], *, lr: float, preempted: Callable[[], bool] = nobody_asks
    ) -> StepResult:
        """Send the micro-batches through, add up what others know of the same weights, then update."""
        count = TokenCount(micro_batches, device=self.device, copies=self._copies)
        with self._clock.phase("pipeline"):
            # FSDP divides gradients by the number of shards
            own_sum = self._flow.train(micro_batches, factor=self._shards * self._update.scale.value / count.total())
        with self._clock.phase("reduce"):
            if self._replicas is not None:
                sum_gradients(list(self.module.parameters()), self._replicas)
            self._tied.sum_gradients()
        with self._clock.phase("optimizer"):
            return self._update.apply(own_sum, count.total(), lr=lr, preempted=preempted())

    def loss_of(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Return the summed loss and the number of tokens, without dropout, on the last stage; nothing elsewhere."""
        labels = [micro_batch.labels.to(self.device) for micro_batch in micro_batches]
        tokens = [micro_batch.input_ids.to(self.device) for micro_batch in micro_batches]
        with self._forward_only():
            losses = self._relay.through(tokens, lambda stretch, state, index: stretch(state, labels=labels[index]))
        if not losses:
            return 0.0, 0
        return torch.cat(losses).double().sum().item(), num_labels(micro_batches)

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Continue greedily; each pipeline does all of it by itself."""
        decoder = Decoder(self._relay, first_blocks=[blocks.start for blocks in self._cut.blocks])
        with self._forward_only():
            return decoder.continue_greedily(input_ids.to(self.device), max_new_tokens=max_new_tokens)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of this rank's stretches; a tied one comes at both ends, under both its names."""
        for stretch in self._own.values():
            yield from whole_parameters(stretch.model, device=self.device)

    @contextmanager
    def _forward_only(self) -> Iterator[None]:
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            free_gathered(self._own.values())

    def held(self) -> StateBytes:
        """Count weights, gradients and moments of this rank's stretches."""
        return torch_state(self.module, self._update.optimizer, device=self.device)

    def save(self, folder: Path) -> None:
        """Write weights and moments by name, each rank its own, and generators rank by rank."""
        tensors, _ = self._tensors()
        save_tensors(folder / "shards", tensors)
        if self._rank == 0:
            write_json(folder / "loss_scale.json", self._update.scale.state())
        save_rng(folder, rank=self._rank, device=self.device)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote, at whatever number of stages.

        Raises:
            JobError: the folder does not hold this model.
        """
        tensors, twins = self._tensors()
        load_tensors(folder / "shards", tensors)
        copy_to_twins(tensors, twins)
        with named(folder / "loss_scale.json"):
            self._update.scale.restore(read_json(folder / "loss_scale.json"))
        load_rng(folder, rank=self._rank, device=self.device)

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return named_state(list(self._own.values()), self._update.optimizer, self._cut.tied)

    def close(self) -> None:
        """Leave the process group, after what refers to it."""
        del self._flow, self._relay
        gc.collect()
        disconnect()
