"""Every rank holds the whole model: one process, or torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.errors import ConfigError
from launcher.models.base import Shape
from launcher.optim.adamw import AdamW
from launcher.parallel.base import Engine, Parallel, StateBytes
from launcher.precision import Precision


@dataclass(frozen=True, kw_only=True)
class _Replicated(Parallel):
    engine: ClassVar[Engine] = "torch"

    def state_bytes(self, shape: Shape, world_size: int, precision: Precision) -> StateBytes:
        """Return fp32 weights and gradients (compute copies are autocast's and short-lived) and two fp32 moments."""
        return StateBytes.fp32(shape.num_params)

    def formula(self, world_size: int, precision: Precision) -> str:
        """Return the sum; nothing depends on the world size."""
        return "4N weights + 4N gradients + 8N Adam moments = 16N bytes, all in fp32 (ZeRO, arXiv:1910.02054, sec. 3.1)"


@dataclass(frozen=True, kw_only=True)
class Single(_Replicated):
    """One rank, no communication: what every other strategy is compared with."""

    kind: ClassVar[str] = "single"
    max_ranks: ClassVar[int | None] = 1

    def refusals(
        self, world_size: int, precision: Precision, *, optimizer: AdamW, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Refuse a world of several ranks."""
        if world_size != 1:
            yield ConfigError(
                "parallel", "single", why=f"the run has {world_size} ranks", fix="set parallel=ddp or backend.ranks=1"
            )


@dataclass(frozen=True, kw_only=True)
class Ddp(_Replicated):
    """Data parallel: gradients are averaged over ranks (Li et al., 2020, arXiv:2006.15704)."""

    kind: ClassVar[str] = "ddp"

    bucket_mb: int = 25
    """Gradients are reduced in buckets of this size while the backward pass goes on."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse an empty bucket."""
        yield from self.below(1, "bucket_mb")
