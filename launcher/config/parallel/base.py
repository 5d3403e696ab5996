"""Base of every parallel strategy: its dimensions, its model state in bytes, and its checks."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from launcher.config.component import Component
from launcher.config.model.shape import Shape
from launcher.config.optimizer import Optimizer
from launcher.config.precision import Precision
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch, NativeOps, StateBytes


def training_state(moments: float) -> str:
    """Return the fp32 training state of N parameters in bytes, as text."""
    return f"4N weights + 4N gradients + {4 * moments:.3g}N {'Adam moments' if moments == 2 else 'optimizer state'}"


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """One number for each kind of parallelism; their product is the world size.

    The fields stand in the order of ranks, slowest first: ranks next to each other share a tensor, far apart ones are
    stages of a pipeline, because tensor parallelism talks the most and a pipeline the least.
    """

    pipeline: int = 1
    """Stages; each holds some of the layers."""
    data: int = 1
    """Replicas that see different samples and hold the same parameters."""
    shard: int = 1
    """Ranks that see different samples and hold a share of the parameters each."""
    sequence: int = 1
    """Ranks that see different tokens of the same samples."""
    tensor: int = 1
    """Ranks that hold slices of each matrix and see the same samples."""

    @property
    def product(self) -> int:
        """The world size that they need."""
        return math.prod(dataclasses.astuple(self))

    @property
    def data_parallel(self) -> int:
        """How many different micro-batches are worked on at a time."""
        return self.data * self.shard

    @property
    def shards_parameters(self) -> bool:
        """Whether a rank holds a part of a parameter."""
        return self.shard * self.sequence * self.tensor > 1

    @property
    def copies(self) -> int:
        """How many ranks are given the same tokens."""
        return self.pipeline * self.tensor

    def named(self) -> dict[str, int]:
        """Return the degrees that divide something, or the number of replicas where none does."""
        used = {name: degree for name, degree in dataclasses.asdict(self).items() if degree > 1}
        return used or {"data": self.data}

    def coordinate(self, rank: int, kind: str) -> int:
        """Return the rank's index, from 0, in its ``kind`` of group (``pipeline``, ``data``, …)."""
        names = [field.name for field in dataclasses.fields(self)]
        sizes = dataclasses.astuple(self)
        at = names.index(kind)
        place: int = rank // math.prod(sizes[at + 1 :]) % sizes[at]
        return place

    def data_rank(self, rank: int) -> int:
        """Return which of the ``data_parallel`` shares of a batch ``rank`` works on."""
        return self.coordinate(rank, "data") * self.shard + self.coordinate(rank, "shard")

    def __str__(self) -> str:
        return " × ".join(f"{name} {degree}" for name, degree in self.named().items()) + f" = {self.product}"


EngineKind = Literal["torch", "deepspeed"]
"""Whose machinery takes the steps of a run."""


@dataclass(frozen=True, kw_only=True)
class Parallel(Component):
    """A strategy and the engine that carries it out."""

    group: ClassVar[str] = "parallel"
    engine: ClassVar[EngineKind]
    max_ranks: ClassVar[int | None] = None
    """Most ranks that it can use; ``backend.ranks=auto`` takes no more."""

    degree_options: ClassVar[tuple[str, ...]] = ()
    """Options that set a degree of parallelism."""

    @property
    def skips_steps(self) -> bool:
        """Whether a step can leave the weights as they are because of its loss."""
        return True

    @property
    def needs_equal_shapes(self) -> bool:
        """Whether all batches must have the same number of tokens a row."""
        return False

    @property
    def keeps_state_on_nvme(self) -> bool:
        """Whether weights or moments lie on NVMe, so that host memory has no room for copies."""
        return False

    def dims(self, world_size: int) -> ParallelDims:
        """Return how the world is divided, or the most ranks that can be used if it is uneven."""
        return ParallelDims(data=world_size)

    @property
    def gradient_accumulation_steps(self) -> int | None:
        """Forward passes per optimizer step that the strategy itself asks for, if it does."""
        return None

    @property
    def default_gradient_accumulation_steps(self) -> int:
        """Forward passes per optimizer step where no option sets them."""
        return 1

    def data_parallel(self, world_size: int) -> int:
        """Return how many different micro-batches the world works on at a time."""
        return self.dims(world_size).data_parallel

    @abstractmethod
    def state_bytes(self, shape: Shape, world_size: int, precision: Precision, *, moments: float = 2) -> StateBytes:
        """Return one rank's share of parameters, gradients and optimizer state.

        Args:
            shape: of the model.
            world_size: number of ranks.
            precision: of the run.
            moments: fp32 tensors of a parameter's shape that the optimizer's state of it is as large as; strategies
                with AdamW alone have two.
        """

    @abstractmethod
    def state_formula(self, world_size: int, precision: Precision, *, moments: float = 2) -> str:
        """Return the formula of :meth:`state_bytes` as text, with its source."""

    def validate_run(
        self, world_size: int, precision: Precision, *, optimizer: Optimizer, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Yield why this strategy cannot run with the rest of the run.

        ``shape`` is ``None`` while it is not known.
        """
        yield from ()

    def validate_batch(self, batch: Batch) -> Iterator[ConfigError]:
        """Yield why this strategy cannot take steps of this batch."""
        yield from ()

    def native_ops(self, optimizer: Optimizer) -> NativeOps:
        """Return the native operators to compile before ranks start."""
        return NativeOps()

    def engine_config(
        self, *, batch: Batch, clip_norm: float, optimizer: Optimizer, precision: Precision
    ) -> dict[str, Any] | None:
        """Return the configuration file the engine takes, or ``None`` when it takes none."""
        return None

    def warnings(self, precision: Precision, *, on_gpu: bool) -> Iterator[str]:
        """Yield warnings about a valid combination."""
        yield from ()
