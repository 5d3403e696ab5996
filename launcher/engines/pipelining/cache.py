"""Keys and values of one stretch of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DynamicCache

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


class StretchCache(DynamicCache):  # type: ignore[misc]
    """A cache whose first layer is the first block of the stretch: blocks go on counting as in the whole model.

    Args:
        config: of the stretch.
        first_block: number of its first block in the whole model.
    """

    def __init__(self, config: PreTrainedConfig, *, first_block: int) -> None:
        super().__init__(config=config)
        self._first_block = first_block

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens in block ``layer_idx`` of the whole model; return those of all tokens."""
        number = layer_idx - self._first_block
        both: tuple[Tensor, Tensor] = super().update(key_states, value_states, number, *args, **options)
        return both
