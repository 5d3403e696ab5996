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

    def attend(self, tokens: Tokens, query: Tensor, keys: Tensor, values: Tensor, *, scale: float | None) -> Tensor:
        """Return attention of each token over its own sequence, (1, tokens, heads, width).

        Args:
            tokens: where they are.
            query: (1, heads, tokens, width).
            keys: (tokens of all pages, heads, width).
            values: likewise.
            scale: of scores.
        """
        asked = query[0].transpose(0, 1).contiguous()
        out = torch.empty_like(asked)
        _, heads, dim = asked.shape
        self._call(
            byref(tokens),
            asked.data_ptr(),
            out.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            heads,
            keys.shape[1],
            dim,
            dim**-0.5 if scale is None else scale,
            int(asked.dtype == torch.bfloat16),
            self._scratch.of(2 * asked.numel()),
        )
        return out[None]
