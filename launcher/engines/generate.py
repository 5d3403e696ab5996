"""Greedy generation, for the sample at the end of a run and for verification."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from launcher.models.transforms import without_compile

if TYPE_CHECKING:
    from torch import nn


def generate_greedily(module: nn.Module, input_ids: Tensor, *, max_new_tokens: int, synced: bool = False) -> Tensor:
    """Return ``input_ids`` with the most likely continuation.

    Args:
        module: a causal language model of Transformers, in evaluation mode.
        input_ids: (sequences, tokens), all of equal length.
        max_new_tokens: length of the continuation.
        synced: all ranks take every forward pass together, as a partitioned model needs.
    """
    with without_compile(module):
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


PADDING_ID = 0
"""Id behind the end of a sequence that has ended before others."""


def greedy_decode(
    next_tokens: Callable[[Tensor], Tensor], input_ids: Tensor, *, max_new_tokens: int, ends: int | list[int] | None
) -> Tensor:
    """Return ``input_ids`` (sequences, tokens) with Transformers' greedy continuation.

    Args:
        next_tokens: the most likely token behind each sequence it is given, of shape (sequences,).
        input_ids: all of equal length.
        max_new_tokens: length of the continuation; less where all sequences have ended.
        ends: tokens that end a sequence.
    """
    ending = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], device=input_ids.device)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        tokens = next_tokens(input_ids).masked_fill(ended, PADDING_ID)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        ended |= torch.isin(tokens, ending)
        if ended.all():
            break
    return input_ids
