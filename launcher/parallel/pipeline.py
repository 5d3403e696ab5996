"""Pipeline parallelism: layers cut into stages, micro-batches flowing through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.degrees import Degrees
from launcher.errors import ConfigError
from launcher.models.base import Shape
from launcher.optim.adamw import AdamW
from launcher.parallel.base import Engine, Parallel, StateBytes
from launcher.precision import Precision

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"]


@dataclass(frozen=True, kw_only=True)
class Pipeline(Parallel):
    """Stages on ranks of their own, by torch.distributed.pipelining; pipelines side by side share each batch."""

    kind: ClassVar[str] = "pipeline"
    engine: ClassVar[Engine] = "torch"
    headline: ClassVar[tuple[str, ...]] = ("stages", "schedule")
    degree_options: ClassVar[tuple[str, ...]] = ("stages",)

    stages: int = 2
    """Ranks that one pipeline is made of."""

    schedule: ScheduleName = "1f1b"
    """Order of forward and backward passes: GPipe (arXiv:1811.06965), 1F1B (arXiv:1806.03377), interleaved 1F1B
    (arXiv:2104.04473), and zero bubble, interleaved or in a V (arXiv:2401.10241)."""

    micro_batches: int | None = None
    """Micro-batches of a step that flow through each pipeline; by default what the batch equation leaves
    (``job.accumulation``, or ``job.global_batch`` divided)."""

    chunks: int | None = None
    """Stretches of layers on each rank; by default 2 under interleaved and V schedules, else 1."""

    balance: Literal["parameters", "time"] = "parameters"
    """What stages are made equal in: parameters, or the measured time of each layer."""

    data: Literal["replicate", "shard"] = "replicate"
    """What pipelines side by side do with a stage: each holds it whole, or FSDP2 shards it over them."""

    @property
    def num_chunks(self) -> int:
        """Stretches of layers on each rank."""
        if self.chunks is not None:
            return self.chunks
        return 1 if self.schedule in ("gpipe", "1f1b") else 2

    @property
    def accumulation(self) -> int | None:
        """Return the micro-batches of a step, where they are set here."""
        return self.micro_batches

    def degrees(self, world_size: int) -> Degrees:
        """Return the degrees; pipelines side by side take the rest."""
        beside = max(1, world_size // self.stages)
        if self.data == "shard":
            return Degrees(pipeline=self.stages, shard=beside)
        return Degrees(pipeline=self.stages, data=beside)

    def problems(self) -> Iterator[ConfigError]:
        """Refuse counts that make no pipeline, and chunks that a schedule does not have."""
        yield from self.below(1, "stages", "micro_batches", "chunks")
        if self.chunks is None:
            return
        if self.schedule in ("gpipe", "1f1b") and self.chunks != 1:
            fix = "set parallel.chunks=1 or parallel.schedule=interleaved_1f1b"
            yield self.refuse("chunks", f"schedule {self.schedule} has one stretch of layers a rank", fix)
        if self.schedule == "zbv" and self.chunks != 2:
            yield self.refuse("chunks", "a V has two stretches of layers a rank", "set parallel.chunks=2")

    def state_bytes(self, num_params: int, world_size: int, precision: Precision) -> StateBytes:
        """Return a stage's share of fp32 weights, gradients and moments, as if stages were equal."""
        degrees = self.degrees(world_size)
        share = -(-num_params // (degrees.pipeline * degrees.shard))
        return StateBytes(parameters=4 * share, gradients=4 * share, optimizer=8 * share)

    def formula(self, world_size: int, precision: Precision) -> str:
        """Return the sum in words."""
        degrees = self.degrees(world_size)
        over = f"{degrees.pipeline} stages" + (f" × {degrees.shard} shards" if degrees.shard > 1 else "")
        return f"(4N weights + 4N gradients + 8N Adam moments) / ({over}), all in fp32, stages taken as equal"

    def refusals(
        self, world_size: int, precision: Precision, *, optimizer: AdamW, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Refuse more stages than layers."""
        wanted = self.stages * self.num_chunks
        if shape is not None and wanted > shape.layers:
            most = shape.layers // self.num_chunks
            why = f"{self.stages} stages × {self.num_chunks} = {wanted} stretches of {shape.layers} layers"
            yield self.refuse("stages", why, f"set parallel.stages={max(1, most)}")
