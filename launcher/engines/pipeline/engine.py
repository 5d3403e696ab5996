"""The pipeline engine on torch.distributed.pipelining; each stage replicated or sharded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

from launcher.config.parallel.pipeline import Pipeline, rank_of_chunk
from launcher.engines.base import Engine, Observer, StepResult, never_preempted
from launcher.engines.distributed import TokenCount, choose_device, connect, disconnect, mesh_of, num_labels, submesh
from launcher.engines.generate import greedy_decode
from launcher.engines.kept_zeros import linear_matrices
from launcher.engines.loss import places_of_all
from launcher.engines.model_state import torch_state_bytes, whole_parameters
from launcher.engines.optimizer import OptimizerStep
from launcher.engines.pipeline.partition import build_chunk, choose_partition
from launcher.engines.pipeline.schedules import PipelineForward, PipelineSchedule, chunks_of_rank
from launcher.engines.pipeline.stage import ChunkCache
from launcher.engines.pipeline.tied_weights import TiedWeights, copy_to_twins, named_state
from launcher.engines.state import fill_tensors, persistent_buffers, restore_rng, rng_tensors, shards_of
from launcher.models.layers import blocks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig

    from launcher.checkpoint.tensors import Shard, StoredState
    from launcher.data.dataloader import MicroBatch
    from launcher.engines.context import Context
    from launcher.engines.pipeline.stage import ModelChunk
    from launcher.engines.source_losses import SourceLosses
    from launcher.profiling.performance import StepClock
    from launcher.protocol.plan import StateBytes


class PipelineEngine(Engine):
    """This rank's chunks of the model, run by a schedule; fp32 master weights, autocast."""

    def __init__(self, context: Context, clock: StepClock) -> None:
        run, parallel, dims = context.run, context.run.parallel, context.dims
        assert isinstance(parallel, Pipeline), "the strategy chose this engine"
        self._clock, self._rank, self._copies = clock, context.rank, dims.copies
        self._adapter_only = run.lora is not None
        self._shards = dims.shard
        self.device = choose_device(context.local_rank)
        connect(context, self.device)
        mesh = mesh_of(dims, device=self.device)
        replicas, shards = submesh(mesh, "data"), submesh(mesh, "shard")
        self._group = mesh["pipeline"].get_group()
        self._replicas = replicas.get_group() if replicas is not None else None
        count = dims.pipeline * parallel.num_chunks
        self._owners = [rank_of_chunk(parallel.schedule, number, ranks=dims.pipeline) for number in range(count)]
        self._partition = choose_partition(context, count=count, by_time=parallel.balance == "time", device=self.device)
        here = dist.get_rank(self._group)
        numbers = chunks_of_rank(parallel.schedule, rank=here, ranks=dims.pipeline, chunks=parallel.num_chunks)
        self._chunks = {number: build_chunk(context, self._partition, number, device=self.device) for number in numbers}
        if shards is not None:
            for chunk in self._chunks.values():
                shard_chunk(chunk, shards)
        self.module = nn.ModuleList(self._chunks.values())
        self._tied = TiedWeights(
            list(self._chunks.values()),
            self._partition.tied,
            group=self._group,
            ends=(self._owners[0], self._owners[-1]),
            share=shards is None,
        )
        self._state_names = run.optimizer.saved_names
        self._update = OptimizerStep(
            [chunk.model for chunk in self._chunks.values()],
            run,
            device=self.device,
            stages=self._group,
            counted_elsewhere=self._tied.counted_elsewhere,
            tied=self._partition.tied,
        )
        self._forward = PipelineForward(
            self._chunks,
            owners=self._owners,
            hidden_size=self._partition.config.hidden_size,
            device=self.device,
            group=self._group,
        )
        self._schedule = PipelineSchedule(
            self._chunks,
            schedule=parallel.schedule,
            count=count,
            hidden_size=self._partition.config.hidden_size,
            device=self.device,
            group=self._group,
        )
        torch.manual_seed(run.job.seed + context.rank)  # no two ranks drop the same activations

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        max_loss: float | None = None,
        preempted: Callable[[], bool] = never_preempted,
    ) -> StepResult:
        """Send the micro-batches through, add up what others know of the same weights, then update."""
        count = TokenCount(micro_batches, device=self.device, copies=self._copies)
        with self._clock.phase("pipeline"):
            # FSDP divides gradients by the number of shards
            factor = self._shards * self._update.scale.value / count.total()
            own_sum = self._schedule.train(micro_batches, factor=factor)
        with self._clock.phase("reduce"):
            if self._replicas is not None:
                sum_gradients([p for p in self.module.parameters() if p.requires_grad], self._replicas)
            self._tied.sum_gradients()
        with self._clock.phase("optimizer"):
            return self._update.apply(own_sum, count.total(), lr=lr, max_loss=max_loss, preempted=preempted())

    def add_losses_to(self, by_source: SourceLosses) -> None:
        """Add up losses in the last chunk."""
        super().add_losses_to(by_source)
        for chunk in self._chunks.values():
            chunk.by_source = by_source

    def loss_of(self, micro_batches: Sequence[MicroBatch], *, observe: Observer | None = None) -> tuple[float, int]:
        """Return summed loss and token count on the last stage, without dropout; else nothing."""
        assert observe is None, "the plan refuses metrics under pipelines"
        labels = [micro_batch.labels.to(self.device) for micro_batch in micro_batches]
        tokens = [micro_batch.input_ids.to(self.device) for micro_batch in micro_batches]
        where = [None if (ids := batch.position_ids) is None else ids.to(self.device) for batch in micro_batches]

        def call(chunk: ModelChunk, state: Tensor, index: int) -> Tensor:
            if not chunk.last:
                hidden: Tensor = chunk(state, position_ids=where[index])
                return hidden
            batch = micro_batches[index]
            places = places_of_all([batch.labels])
            found: Tensor = chunk(
                state,
                labels=labels[index],
                position_ids=where[index],
                places=None if places is None else places.to(self.device),
                sources=batch.sources,
            )
            return found

        with self._forward_only():
            losses = self._forward.forward(tokens, call)
        if not losses:
            return 0.0, 0
        return torch.cat(losses).double().sum().item(), num_labels(micro_batches)

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Continue greedily; each pipeline does all of it by itself."""
        decoder = GreedyDecoder(self._forward, first_blocks=[blocks.start for blocks in self._partition.blocks])
        with self._forward_only():
            return decoder.generate(input_ids.to(self.device), max_new_tokens=max_new_tokens)

    @property
    def model_config(self) -> PreTrainedConfig:
        """Configuration of the whole model."""
        return self._partition.config

    @property
    def adapter_config(self) -> Mapping[str, Any] | None:
        """PEFT's config of the adapter that is trained."""
        return self._partition.adapter_config

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of this rank's chunks; a tied one at both ends, with both names."""
        for chunk in self._chunks.values():
            yield from whole_parameters(chunk.model, device=self.device)

    def linear_matrices(self) -> dict[str, nn.Parameter]:
        """Return those of this rank's chunks."""
        return linear_matrices(chunk.model for chunk in self._chunks.values())

    @contextmanager
    def _forward_only(self) -> Iterator[None]:
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            reshard_all(self._chunks.values())

    def state_bytes(self) -> StateBytes:
        """Count weights, gradients and moments of this rank's chunks."""
        return torch_state_bytes(self.module, self._update.optimizer, device=self.device)

    def shards(self) -> list[Shard]:
        """Return weights and moments of this rank's chunks, and its generators."""
        tensors, _ = self._tensors()
        return shards_of(tensors | rng_tensors(self.device))

    def load_shards(self, source: StoredState) -> None:
        """Fill weights and moments of this rank's chunks in place."""
        tensors, twins = self._tensors()
        fill_tensors(tensors, source)
        copy_to_twins(tensors, twins)
        restore_rng(source, device=self.device)

    def scalars(self) -> dict[str, float]:
        """Return the loss scale."""
        return self._update.scale.state()

    def restore_scalars(self, scalars: Mapping[str, float]) -> None:
        """Set the loss scale."""
        self._update.scale.restore(scalars)

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what checkpoints hold by name, sharing storage, and the copies of tied weights."""
        chunks, tied = list(self._chunks.values()), self._partition.tied
        tensors, twins = named_state(
            chunks, self._update.optimizer, tied, state_names=self._state_names, adapter_only=self._adapter_only
        )
        if not self._adapter_only:
            for chunk in chunks:
                tensors |= persistent_buffers(chunk.model)
        return tensors, twins

    def close(self) -> None:
        """Leave the process group, after what refers to it."""
        del self._schedule, self._forward
        gc.collect()
        disconnect()


class GreedyDecoder:
    """Passes on all of the prompt, then one token a sequence at a time.

    Args:
        relay: of chunks in evaluation mode.
        first_blocks: number of the first block of each chunk.
    """

    def __init__(self, relay: PipelineForward, *, first_blocks: Sequence[int]) -> None:
        self._forward = relay
        self._caches = {
            number: ChunkCache(chunk.model.config, first_block=first_blocks[number])
            for number, chunk in relay.own.items()
        }
        some = next(iter(relay.own.values()))
        self._ends = some.model.generation_config.eos_token_id
        self._num_seen = 0

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Return ``input_ids`` (sequences, tokens) with a greedy continuation, on every rank.

        A sequence ends with an end-of-text token; generation stops when all have ended. Call it once, under
        ``no_grad``.
        """
        return greedy_decode(self._next_tokens, input_ids, max_new_tokens=max_new_tokens, ends=self._ends)

    def _next_tokens(self, ids: Tensor) -> Tensor:
        """Return the tokens (sequences,) after ``ids`` (sequences, tokens), given the caches."""
        new = ids[:, self._num_seen :]
        self._num_seen = ids.shape[1]
        logits = self._forward.forward([new], self._with_cache)
        chosen = logits[0].argmax(dim=-1) if logits else torch.empty(len(new), dtype=torch.int64, device=new.device)
        dist.broadcast(chosen, src=self._forward.last_owner, group=self._forward.group)
        return chosen

    def _with_cache(self, chunk: ModelChunk, state: Tensor, _: int) -> Tensor:
        logits: Tensor = chunk(state, cache=self._caches[chunk.number])
        return logits


_BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel


def sum_gradients(parameters: Sequence[nn.Parameter], group: ProcessGroup) -> None:
    """Replace gradients by their sums over ``group``, in large messages; ``None`` counts as 0."""
    for bucket in _buckets(parameters):
        flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([parameter.numel() for parameter in bucket])
        torch._foreach_copy_([p.grad for p in bucket], [part.view_as(p) for p, part in zip(bucket, parts, strict=True)])


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        size += parameter.numel() * parameter.element_size()
        bucket.append(parameter)
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def shard_chunk(chunk: ModelChunk, mesh: DeviceMesh) -> None:
    """Shard blocks one by one, and the remaining parameters together.

    What a step has gathered stays until its end: torch's pipeline reduces gradients once, after the last micro-batch,
    and gathering again for each would send everything as many times.
    """
    for block in blocks(chunk.model):
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(chunk, mesh=mesh, reshard_after_forward=False)


def reshard_all(chunks: Iterable[nn.Module]) -> None:
    """Keep only shards; after passes without a backward pass nothing else would."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
