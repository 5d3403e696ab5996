"""Greedy generation from nothing but a function that says what comes next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PADDING = 0
"""Id behind the end of a sequence that has ended before others."""


def greedily(
    next_tokens: Callable[[Tensor], Tensor], input_ids: Tensor, *, max_new_tokens: int, ends: int | list[int] | None
) -> Tensor:
    """Return ``input_ids`` (sequences, tokens) with the continuation that Transformers' ``generate`` would give.

    Args:
        next_tokens: the most likely token behind each sequence it is given, of shape (sequences,).
        input_ids: all of equal length.
        max_new_tokens: length of the continuation; less where all sequences have ended.
        ends: tokens that end a sequence.
    """
    ending = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], device=input_ids.device)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        tokens = next_tokens(input_ids).masked_fill(ended, PADDING)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        ended |= torch.isin(tokens, ending)
        if ended.all():
            break
    return input_ids
