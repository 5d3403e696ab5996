"""What the layers of a model keep of each token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a layer keeps of a token, for each layer."""

    keys: tuple[tuple[int, int], ...]
    """Heads and width."""
    values: tuple[tuple[int, int], ...]
    item_bytes: int
    first_layer: int = 0
    """Number of the first of these layers in the model."""

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        return sum(heads * width for heads, width in (*self.keys, *self.values)) * self.item_bytes
