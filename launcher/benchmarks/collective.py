"""One collective on one message: what goes in, the call, and what has to come out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch import distributed as dist

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""torch 2.13 has new names for them, and complains of the old ones."""

_PERIOD = 31
"""Of the values of a message. Sums over up to a thousand ranks stay exact in fp32, and values that land in the wrong
place differ, because no power of two is a multiple of it."""


class Collective(ABC):
    """A message of fp32 values on this rank.

    Args:
        count: values of the larger side, input or output; a multiple of the number of ranks.
        device: where they are.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._pattern = (torch.arange(count, device=device) % _PERIOD + 1).to(torch.float32)
        share = count // self._world_size
        self._own = slice(self._rank * share, (self._rank + 1) * share)
        self.sent, self.received = self._buffers()

    def fill(self) -> None:
        """Put in what makes every rank's part known by its values, and zeros where results go."""
        self.received.zero_()
        self.sent.copy_(self._input())

    def clear(self) -> None:
        """Put in zeros, which stay zeros however often they are added."""
        self.received.zero_()
        self.sent.zero_()

    def num_wrong(self) -> int:
        """Return how many values are not what the call should have made of ``fill``."""
        return int((self.received != self._expected()).sum().item())

    @abstractmethod
    def call(self) -> None:
        """Do it once; on a GPU, ask for it."""

    @abstractmethod
    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Return tensors for what goes in and what comes out; the same one where it is done in place."""

    def _input(self) -> Tensor:
        """Return what this rank puts in: the pattern times its number, counted from 1."""
        return self._of(self._rank)[: self.sent.numel()]

    @abstractmethod
    def _expected(self) -> Tensor:
        """Return what has to come out on this rank."""

    def _of(self, rank: int) -> Tensor:
        return self._pattern * (rank + 1)

    def _total(self) -> Tensor:
        return self._pattern * (self._world_size * (self._world_size + 1) // 2)

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self._pattern.device)


class AllReduce(Collective):
    """The sum of all ranks' messages, on every rank."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        both = self._empty(self._pattern.numel())
        return both, both

    def call(self) -> None:
        """Add up, in place."""
        dist.all_reduce(self.sent)

    def _expected(self) -> Tensor:
        return self._total()


class AllGather(Collective):
    """All ranks' shares one after the other, on every rank."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        return self._empty(self._pattern.numel() // self._world_size), self._empty(self._pattern.numel())

    def call(self) -> None:
        """Gather."""
        _all_gather(self.received, self.sent)

    def _expected(self) -> Tensor:
        return torch.cat([self._of(rank)[: self.sent.numel()] for rank in range(self._world_size)])


class ReduceScatter(Collective):
    """This rank's share of the sum of all ranks' messages."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        return self._empty(self._pattern.numel()), self._empty(self._pattern.numel() // self._world_size)

    def call(self) -> None:
        """Add up and scatter."""
        _reduce_scatter(self.received, self.sent)

    def _expected(self) -> Tensor:
        return self._total()[self._own]


class Broadcast(Collective):
    """The first rank's message, on every rank."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        both = self._empty(self._pattern.numel())
        return both, both

    def call(self) -> None:
        """Send or receive, in place."""
        dist.broadcast(self.sent, src=0)

    def _expected(self) -> Tensor:
        return self._of(0)


class AllToAll(Collective):
    """This rank's share of each rank's message, one after the other."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        return self._empty(self._pattern.numel()), self._empty(self._pattern.numel())

    def call(self) -> None:
        """Exchange."""
        dist.all_to_all_single(self.received, self.sent)

    def _expected(self) -> Tensor:
        return torch.cat([self._of(rank)[self._own] for rank in range(self._world_size)])


COLLECTIVES: dict[str, type[Collective]] = {
    "all_reduce": AllReduce,
    "all_gather": AllGather,
    "reduce_scatter": ReduceScatter,
    "broadcast": Broadcast,
    "all_to_all": AllToAll,
}
