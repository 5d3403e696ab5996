"""How many pages of keys and values there is room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from launcher.serving.pages import PAGE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.serving.limits import Limits
    from launcher.serving.shapes import Shapes

_SHARE_OF_FREE = 4
"""Keys and values take at most one part in this many of the memory that is free at the start, unless told otherwise."""


def num_pages(limits: Limits, shapes: Shapes, model: PreTrainedModel, *, page: int = PAGE) -> int:
    """Return how many pages an engine keeps.

    Args:
        limits: what it is told.
        shapes: of what a layer keeps of a token.
        model: on its device.
        page: tokens of one.
    """
    if limits.kv_tokens is not None:
        return max(1, limits.kv_tokens // page)
    device = model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    affordable = free // _SHARE_OF_FREE // (shapes.token_bytes * page)
    wanted = limits.max_requests * -(-model.config.get_text_config().max_position_embeddings // page)
    return int(max(1, min(wanted, affordable)))
