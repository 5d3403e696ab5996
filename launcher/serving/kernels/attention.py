"""Attention over pages by compiled kernels, for models whose blocks are computed as they stand."""

from __future__ import annotations

from ctypes import byref
from typing import TYPE_CHECKING

import torch

from launcher.serving.kernels.library import Tokens, native
from launcher.serving.kernels.packing import Scratch

if TYPE_CHECKING:
    from torch import Tensor

VECTOR = 16
"""Widths of heads must be multiples of this, the most numbers in a register of any machine."""
MOST_SHARING = 16
"""Heads that may share keys."""


class NativeAttention:
    """Computes attention of one step.

    Args:
        scratch: shared room.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch, self._call = scratch, native().native_attention

    def attend(
        self,
        tokens: Tokens,
        of_tokens: tuple[Tensor, Tensor, Tensor],
        arenas: tuple[Tensor, Tensor],
        *,
        scale: float | None,
    ) -> Tensor:
        """Write keys and values; return attention of each token over its own sequence, (1, tokens, heads, width).

        Args:
            tokens: where they are.
            of_tokens: queries, keys and values of this step; (1, heads, tokens, width) each.
            arenas: keys and values of all pages; kernels lay them out in their own way.
            scale: of scores.
        """
        query, key, value = (part[0].transpose(0, 1).contiguous() for part in of_tokens)
        out = torch.empty_like(query)
        _, heads, dim = query.shape
        self._call(
            byref(tokens),
            *(part.data_ptr() for part in (query, key, value, out, *arenas)),
            heads,
            key.shape[1],
            dim,
            dim**-0.5 if scale is None else scale,
            int(query.dtype == torch.bfloat16),
            self._scratch.of(2 * (query.numel() + key.numel())),
        )
        return out[None]
