"""Greedy generation through a pipeline: each stretch keeps keys and values of its own blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

from launcher.engines.greedy import greedily
from launcher.engines.pipelining.cache import StretchCache

if TYPE_CHECKING:
    from launcher.engines.pipelining.relay import Relay
    from launcher.engines.pipelining.stage import Stretch


class Decoder:
    """Passes on all of the prompt, then one token a sequence at a time.

    Args:
        relay: of stretches in evaluation mode.
        first_blocks: number of the first block of each stretch.
    """

    def __init__(self, relay: Relay, *, first_blocks: Sequence[int]) -> None:
        self._relay = relay
        self._caches = {
            number: StretchCache(stretch.model.config, first_block=first_blocks[number])
            for number, stretch in relay.own.items()
        }
        some = next(iter(relay.own.values()))
        self._ends = some.model.generation_config.eos_token_id
        self._num_seen = 0

    def continue_greedily(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Return ``input_ids`` (sequences, tokens) with the most likely continuation, the same on every rank.

        A sequence ends with an end-of-text token; generation stops when all have ended. Call it once, under
        ``no_grad``.
        """
        return greedily(self._next_tokens, input_ids, max_new_tokens=max_new_tokens, ends=self._ends)

    def _next_tokens(self, ids: Tensor) -> Tensor:
        """Return the tokens (sequences,) that follow ``ids`` (sequences, tokens); the caches hold those before."""
        new = ids[:, self._num_seen :]
        self._num_seen = ids.shape[1]
        logits = self._relay.through([new], self._with_cache)
        chosen = logits[0].argmax(dim=-1) if logits else torch.empty(len(new), dtype=torch.int64, device=new.device)
        dist.broadcast(chosen, src=self._relay.last_owner, group=self._relay.group)
        return chosen

    def _with_cache(self, stretch: Stretch, state: Tensor, _: int) -> Tensor:
        logits: Tensor = stretch(state, cache=self._caches[stretch.number])
        return logits
