"""A step as compiled kernels take it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from launcher.serving.kernels.library import Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.serving.plan import StepPlan


class Table:
    """Pages of each sequence, and what each token sees of them.

    Args:
        plan: of the step.
        slots: where keys and values of each token go.
    """

    def __init__(self, plan: StepPlan, *, slots: Tensor) -> None:
        seen: list[int] = []
        row: list[int] = []
        width = max((len(part.pages) for part in plan.segments), default=1)
        pages: list[int] = []
        for index, part in enumerate(plan.segments):
            end = part.start + len(part.tokens)
            seen += range(part.start + 1, end + 1)
            row += [index] * len(part.tokens)
            pages += part.pages
            pages += [0] * (width - len(part.pages))
        seen += [0] * plan.padding
        row += [0] * plan.padding
        self._kept = [slots, *(torch.tensor(numbers or [0]) for numbers in (seen, row, pages))]
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._struct = Tokens(len(seen), *(tensor.data_ptr() for tensor in self._kept), width, None, None)

    def with_rotary(self, rotary: tuple[Tensor, Tensor] | None) -> Tokens:
        """Return it with cosines and sines; all layers of a step are given the same."""
        if rotary is not None and self._rotary is None:
            self._rotary = (rotary[0].contiguous(), rotary[1].contiguous())
            self._struct.cos, self._struct.sin = (part.data_ptr() for part in self._rotary)
        return self._struct
