"""Greedy generation, for the sample at the end of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from launcher.models.compiled import interpreted

if TYPE_CHECKING:
    from torch import Tensor, nn


def greedy(module: nn.Module, input_ids: Tensor, *, max_new_tokens: int, synced: bool = False) -> Tensor:
    """Return ``input_ids`` with the most likely continuation.

    Args:
        module: a causal language model of Transformers, in evaluation mode.
        input_ids: (sequences, tokens), all of equal length.
        max_new_tokens: length of the continuation.
        synced: all ranks take every forward pass together, as a partitioned model needs.
    """
    with interpreted(module):
        return cast(
            "Tensor",
            module.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
                synced_gpus=synced,
            ),
        )
