"""Greedy generation through a pipeline: each stretch keeps keys and values of its own blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

from launcher.engines.pipelining.cache import StretchCache

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from launcher.engines.pipelining.stage import Stretch

_PADDING = 0  # follows a sequence that has ended, as in launcher.engines.generate


class Decoder:
    """Passes tokens from stretch to stretch: all of the prompt, then one token a sequence at a time.

    Args:
        own: this rank's stretches, in evaluation mode, by number.
        owners: rank in ``group`` of each stretch.
        first_blocks: number of the first block of each stretch.
        group: the ranks of this pipeline.
        device: where this rank computes.
    """

    def __init__(
        self,
        own: Mapping[int, Stretch],
        *,
        owners: list[int],
        first_blocks: list[int],
        group: ProcessGroup,
        device: torch.device,
    ) -> None:
        self._own, self._group, self._device = own, group, device
        self._owners = [dist.get_global_rank(group, rank) for rank in owners]
        self._caches = {
            number: StretchCache(stretch.model.config, first_block=first_blocks[number])
            for number, stretch in own.items()
        }
        some = next(iter(own.values())).model
        self._width: int = some.config.hidden_size
        ends = some.generation_config.eos_token_id
        self._ends = torch.tensor([] if ends is None else ends, dtype=torch.int64, device=device).flatten()

    def continue_greedily(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Return ``input_ids`` (sequences, tokens) with the most likely continuation, the same on every rank.

        A sequence ends with an end-of-text token; generation stops when all have ended. Call it under ``no_grad``.
        """
        ids = new = input_ids
        running = torch.ones(len(ids), dtype=torch.bool, device=self._device)
        for _ in range(max_new_tokens):
            chosen = self._next_tokens(new)
            new = torch.where(running, chosen, _PADDING)[:, None]
            ids = torch.cat([ids, new], dim=1)
            running &= ~torch.isin(new[:, 0], self._ends)
            if not running.any():
                break
        return ids

    def _next_tokens(self, new: Tensor) -> Tensor:
        """Return the tokens (sequences,) that follow ``new`` (sequences, tokens) and everything before it."""
        here, last = dist.get_rank(), len(self._owners) - 1
        state, chosen = new, torch.empty(len(new), dtype=torch.int64, device=self._device)
        for number, owner in enumerate(self._owners):
            if owner != here:
                continue
            before = self._owners[number - 1]
            if number > 0 and before != here:
                state = torch.empty(*new.shape, self._width, device=self._device)
                dist.recv(state, src=before, group=self._group)
            state = self._own[number](state, cache=self._caches[number])
            if number == last:
                chosen = state.argmax(dim=-1)
            elif self._owners[number + 1] != here:
                dist.send(state, dst=self._owners[number + 1], group=self._group)
        dist.broadcast(chosen, src=self._owners[last], group=self._group)
        return chosen
