"""What of a model a rank computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Consecutive blocks, with what stands before the first and after the last one of the model."""

    number: int = 0
    count: int = 1
    """Of all stages."""
    first_block: int = 0
    """Number in the model of its first block."""

    @property
    def first(self) -> bool:
        """Whether it takes tokens, not hidden states."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether it gives scores, not hidden states."""
        return self.number == self.count - 1


WHOLE = Stage()
"""The only one."""
