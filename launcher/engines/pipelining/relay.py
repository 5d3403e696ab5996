"""Forward passes through a pipeline, for evaluation and generation.

torch's V schedule has no forward-only mode (2.13 fails in it), and others have one fixed shape each; this takes any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from launcher.engines.pipelining.stage import Stretch

Call = Callable[["Stretch", Tensor, int], Tensor]
"""Calls a stretch on what it is given of a micro-batch, whose number comes last."""


class Relay:
    """Sends micro-batches from stretch to stretch.

    Each goes all the way before a rank begins the next, so with one stretch a rank all ranks are at work; with several,
    a rank waits for its next one. Every pair of ranks then talks in one order, which GPUs need.

    Args:
        own: this rank's stretches by number.
        owners: rank in ``group`` of each stretch.
        width: of the hidden states.
        device: where this rank computes.
        group: the ranks of this pipeline.
    """

    def __init__(
        self,
        own: Mapping[int, Stretch],
        *,
        owners: Sequence[int],
        width: int,
        device: torch.device,
        group: ProcessGroup,
    ) -> None:
        self.own, self.device, self.group, self._width = own, device, group, width
        self._owners: list[int] = [dist.get_global_rank(group, rank) for rank in owners]

    @property
    def last_owner(self) -> int:
        """Rank, among all, that has the last stretch."""
        return self._owners[-1]

    def through(self, tokens: Sequence[Tensor], call: Call) -> list[Tensor]:
        """Return what the last stretch returns for each micro-batch, where it is; nothing elsewhere.

        Args:
            tokens: int64 of shape (sequences, tokens) for each micro-batch, on every rank.
            call: how a stretch is called; used under ``no_grad``.
        """
        here, sending, returned = dist.get_rank(), [], []
        for index, given in enumerate(tokens):
            state = given
            for number, stretch in sorted(self.own.items()):
                if number > 0 and self._owners[number - 1] != here:
                    state = torch.empty(*given.shape, self._width, device=self.device)
                    dist.recv(state, src=self._owners[number - 1], group=self.group)
                state = call(stretch, state, index)
                if stretch.last:
                    returned.append(state)
                elif self._owners[number + 1] != here:
                    sending.append((dist.isend(state, dst=self._owners[number + 1], group=self.group), state))
        for work, _ in sending:  # a tensor lives until it has gone
            work.wait()
        return returned
