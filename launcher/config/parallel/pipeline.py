"""Pipeline parallelism: layers cut into stages, micro-batches flowing through them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.model.shape import Shape
from launcher.config.optimizer import Optimizer
from launcher.config.parallel.base import EngineKind, Parallel, ParallelDims, training_state
from launcher.config.precision import Precision
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch, StateBytes


def partition_layers(costs: Sequence[float], num_chunks: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Cut blocks into chunks of at least one block whose largest cost is the smallest possible.

    Exact, by dynamic programming over (blocks, chunks). Of equal cuts an even one is taken: small sums of squares.

    Args:
        costs: of each block, in order.
        num_chunks: at most as many as there are blocks.
        first: cost of what the first chunk has besides, the embeddings.
        last: cost of what the last chunk has besides, the output head.
    """
    assert 1 <= num_chunks <= len(costs), "every chunk has a block"
    sums = [0.0, *itertools.accumulate(costs)]

    def cost(begin: int, end: int, number: int) -> float:
        extra = first * (number == 0) + last * (number == num_chunks - 1)
        return sums[end] - sums[begin] + extra

    # best[end]: the largest cost, the sum of squares and the cuts of the blocks before ``end``
    best: dict[int, tuple[float, float, tuple[int, ...]]]
    best = {end: (cost(0, end, 0), cost(0, end, 0) ** 2, (0, end)) for end in range(1, len(costs) + 1)}
    for number in range(1, num_chunks):
        best = {
            end: min(
                (max(best[begin][0], here), best[begin][1] + here**2, (*best[begin][2], end))
                for begin in range(number, end)
                for here in [cost(begin, end, number)]
            )
            for end in range(number + 1, len(costs) + 1)
        }
    return [range(begin, end) for begin, end in itertools.pairwise(best[len(costs)][2])]


PipelineScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"]


def micro_batch_choices(schedule: PipelineScheduleName, *, stages: int, wanted: int) -> list[int]:
    """Return ``wanted`` if a schedule takes that many micro-batches, else the nearest it takes.

    1F1B fills the pipeline before anything comes out of it. Interleaved schedules go in rounds of about as many
    micro-batches as there are stages, all rounds alike.
    """

    def fits(number: int) -> bool:
        if schedule == "1f1b":
            return number >= stages
        if schedule in ("interleaved_1f1b", "interleaved_zero_bubble"):
            return number % max(1, number // stages) == 0
        return True

    if fits(wanted):
        return [wanted]
    below = next((number for number in range(wanted - 1, 0, -1) if fits(number)), None)
    above = next(number for number in range(wanted + 1, 2 * (wanted + stages)) if fits(number))
    return [above] if below is None else [below, above]


def rank_of_chunk(schedule: PipelineScheduleName, chunk: int, *, ranks: int) -> int:
    """Return the rank of the pipeline that has ``chunk``."""
    if schedule == "zbv":
        return min(chunk, 2 * ranks - 1 - chunk)
    return chunk % ranks


@dataclass(frozen=True, kw_only=True)
class Pipeline(Parallel):
    """Pipeline stages by torch.distributed.pipelining; parallel pipelines share each batch."""

    kind: ClassVar[str] = "pipeline"
    engine: ClassVar[EngineKind] = "torch"
    summary_fields: ClassVar[tuple[str, ...]] = ("stages", "schedule")
    degree_options: ClassVar[tuple[str, ...]] = ("stages",)

    stages: int = 2
    """Ranks that one pipeline is made of."""

    schedule: PipelineScheduleName = "1f1b"
    """Order of passes: GPipe, 1F1B, interleaved 1F1B, and zero bubble, interleaved or in a V.
    arXiv:1811.06965, arXiv:1806.03377, arXiv:2104.04473 and arXiv:2401.10241."""

    micro_batches: int | None = None
    """Micro-batches a step in each pipeline; default: the batch equation, else twice the stages.
    The batch equation gives ``job.gradient_accumulation_steps``, or ``job.global_batch`` divided."""

    chunks_per_rank: int | None = None
    """Model chunks (consecutive layers) on each rank; default: 2 if interleaved or V, else 1."""

    balance: Literal["parameters", "time"] = "parameters"
    """Measure that balances stages: parameters, or the measured time of each layer."""

    data: Literal["replicate", "shard"] = "replicate"
    """Parallel pipelines ``replicate`` a stage, or ``shard`` it over them by FSDP2."""

    @property
    def num_chunks(self) -> int:
        """Model chunks (runs of consecutive layers) on each rank."""
        if self.chunks_per_rank is not None:
            return self.chunks_per_rank
        return 1 if self.schedule in ("gpipe", "1f1b") else 2

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule takes gradients of weights later than those of what a stage is given."""
        return self.schedule in ("interleaved_zero_bubble", "zbv")

    @property
    def needs_equal_shapes(self) -> bool:
        """True: stages send each other hidden states of one shape."""
        return True

    @property
    def gradient_accumulation_steps(self) -> int | None:
        """Return the micro-batches of a step, where they are set here."""
        return self.micro_batches

    @property
    def default_gradient_accumulation_steps(self) -> int:
        """Return twice the stages: at most a third of the time idle."""
        return 2 * self.stages

    def dims(self, world_size: int) -> ParallelDims:
        """Return the degrees; pipelines side by side take the rest."""
        beside = max(1, world_size // self.stages)
        if self.data == "shard":
            return ParallelDims(pipeline=self.stages, shard=beside)
        return ParallelDims(pipeline=self.stages, data=beside)

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that make no pipeline, and chunks that a schedule does not have."""
        yield from self.validate_minimum(2, "stages")
        yield from self.validate_minimum(1, "micro_batches", "chunks_per_rank")
        if self.chunks_per_rank is None:
            return
        if self.schedule in ("gpipe", "1f1b") and self.chunks_per_rank != 1:
            fix = "set parallel.chunks_per_rank=1 or parallel.schedule=interleaved_1f1b"
            yield self.error("chunks_per_rank", f"schedule {self.schedule} has one model chunk a rank", fix)
        if self.schedule == "zbv" and self.chunks_per_rank != 2:
            yield self.error(
                "chunks_per_rank", "schedule zbv has two model chunks a rank", "set parallel.chunks_per_rank=2"
            )

    def state_bytes(self, shape: Shape, world_size: int, precision: Precision, *, moments: float = 2) -> StateBytes:
        """Return the bytes of the rank with the largest chunks.

        The end chunks have the embeddings and the head besides blocks.
        """
        count, embedding = self.stages * self.num_chunks, shape.vocab_size * shape.hidden_size
        if count > shape.num_hidden_layers:
            return StateBytes.fp32(shape.num_params)  # refused, with the reason
        first = (
            shape.num_params
            - shape.num_hidden_layers * shape.block_params
            - (0 if shape.tie_word_embeddings else embedding)
        )
        held = [0] * self.stages
        cut = partition_layers([shape.block_params] * shape.num_hidden_layers, count, first=first, last=embedding)
        for number, blocks in enumerate(cut):
            ends = first * (number == 0) + embedding * (number == count - 1)
            held[rank_of_chunk(self.schedule, number, ranks=self.stages)] += len(blocks) * shape.block_params + ends
        return StateBytes.fp32(-(-max(held) // self.dims(world_size).shard), moments=moments)

    def state_formula(self, world_size: int, precision: Precision, *, moments: float = 2) -> str:
        """Return the formula as text."""
        dims = self.dims(world_size)
        over = f"{dims.pipeline} stages" + (f" × {dims.shard} shards" if dims.shard > 1 else "")
        return f"({training_state(moments)}) / ({over}), all in fp32; shown is the largest stage"

    def validate_run(
        self, world_size: int, precision: Precision, *, optimizer: Optimizer, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Reject more stages than layers."""
        if shape is None:
            return
        wanted, layers = self.stages * self.num_chunks, shape.num_hidden_layers
        if wanted > layers:
            most = layers // self.num_chunks
            why = f"{self.stages} stages × {self.num_chunks} = {wanted} chunks, and there are {layers} layers"
            fix = f"set parallel.stages={most}" if most > 1 else "set parallel.schedule=1f1b"
            yield self.error("stages", why, fix if layers > 1 else "set parallel=fsdp")

    def validate_batch(self, batch: Batch) -> Iterator[ConfigError]:
        """Reject numbers of micro-batches that the schedule does not take."""
        wanted = batch.gradient_accumulation_steps
        choices = micro_batch_choices(self.schedule, stages=self.stages, wanted=wanted)
        if wanted in choices:
            return
        why = f"schedule {self.schedule} cannot send {wanted} micro-batches through {self.stages} stages"
        numbers = " or ".join(
            f"{number} (job.global_batch={batch.micro_batch * number * batch.data_parallel})" for number in choices
        )
        fix = f"set parallel.micro_batches to {numbers}, or parallel.schedule=gpipe"
        yield self.error("micro_batches", why, fix)
