"""What every parallel strategy answers without importing torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from launcher.batch import Batch
from launcher.component import Component
from launcher.degrees import Degrees
from launcher.errors import ConfigError
from launcher.models.base import Shape
from launcher.optim.adamw import AdamW
from launcher.precision import Precision

Engine = Literal["torch", "deepspeed"]
"""Whose machinery takes the steps of a run."""


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Model state of one rank in bytes, by where it lives; activations and buffers come on top."""

    parameters: int
    gradients: int
    optimizer: int
    """Master weights, where the compute format is not fp32, and both Adam moments."""
    host: int = 0
    """The part of the above that is offloaded to host RAM."""
    nvme: int = 0
    """The part of the above that is offloaded to NVMe."""

    @classmethod
    def fp32(cls, num_params: int, *, offloaded: bool = False) -> StateBytes:
        """Return what so many parameters take with weights, gradients and both moments in fp32."""
        host = 16 * num_params if offloaded else 0
        return cls(parameters=4 * num_params, gradients=4 * num_params, optimizer=8 * num_params, host=host)

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        """The part that stays on the compute device."""
        return self.total - self.host - self.nvme


@dataclass(frozen=True, kw_only=True)
class NativeOps:
    """DeepSpeed operators a run compiles before its ranks start."""

    needed: tuple[str, ...] = ()
    """Without these the run cannot be what was asked for."""
    optional: tuple[str, ...] = ()
    """Without these the run takes another way and says so."""


@dataclass(frozen=True, kw_only=True)
class Parallel(Component):
    """A strategy and the engine that carries it out."""

    group: ClassVar[str] = "parallel"
    engine: ClassVar[Engine]
    max_ranks: ClassVar[int | None] = None
    """The most ranks it can use; ``backend.ranks=auto`` takes no more."""

    degree_options: ClassVar[tuple[str, ...]] = ()
    """Options that set a degree of parallelism."""

    payload_options: ClassVar[tuple[str, ...]] = ()
    """Options that decide what a checkpoint looks like: a run with others cannot continue from it."""

    resizable: ClassVar[bool] = True
    """Whether a checkpoint of one world size loads at another."""

    def degrees(self, world_size: int) -> Degrees:
        """Return how the world is divided; where that does not come out even, as many ranks as can be used."""
        return Degrees(data=world_size)

    @property
    def accumulation(self) -> int | None:
        """Forward passes per optimiser step that the strategy itself asks for, if it does."""
        return None

    @property
    def usual_accumulation(self) -> int:
        """Forward passes per optimiser step where nobody says anything about them."""
        return 1

    def data_parallel(self, world_size: int) -> int:
        """Return how many different micro-batches the world works on at a time."""
        return self.degrees(world_size).data_parallel

    @abstractmethod
    def state_bytes(self, shape: Shape, world_size: int, precision: Precision) -> StateBytes:
        """Return one rank's share of parameters, gradients and optimiser state."""

    @abstractmethod
    def formula(self, world_size: int, precision: Precision) -> str:
        """Return the arithmetic of :meth:`state_bytes` in words, with its source."""

    def refusals(
        self, world_size: int, precision: Precision, *, optimizer: AdamW, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Yield why this strategy cannot run with the rest of the run; ``shape`` is ``None`` while it is not known."""
        yield from ()

    def batch_refusals(self, batch: Batch) -> Iterator[ConfigError]:
        """Yield why this strategy cannot take steps of this batch."""
        yield from ()

    def native_ops(self, optimizer: AdamW) -> NativeOps:
        """Return what has to be compiled before ranks start."""
        return NativeOps()

    def engine_config(
        self, *, batch: Batch, clip_norm: float, optimizer: AdamW, precision: Precision
    ) -> dict[str, Any] | None:
        """Return the configuration file the engine takes, or ``None`` when it takes none."""
        return None

    def notes(self, precision: Precision, *, on_gpu: bool) -> Iterator[str]:
        """Yield what a user should know of a combination that works."""
        yield from ()
