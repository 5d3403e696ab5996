"""Degrees of parallelism: how many ways each kind divides the work, and where a rank stands in them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Degrees:
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
    def copies(self) -> int:
        """How many ranks are given the same tokens."""
        return self.pipeline * self.tensor

    def named(self) -> dict[str, int]:
        """Return the degrees that divide something, or the number of replicas where none does."""
        used = {name: degree for name, degree in dataclasses.asdict(self).items() if degree > 1}
        return used or {"data": self.data}

    def coordinate(self, rank: int, kind: str) -> int:
        """Return where ``rank`` stands among the ``kind`` (``pipeline``, ``data``, …) it belongs to, from 0."""
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
