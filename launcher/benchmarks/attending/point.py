"""What is measured: a kernel, forward or forward and backward, at one length of the sequence, and what RAM it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kernel = Literal["mha_weights", "mha", "mha_eval", "eager", "sdpa_math", "sdpa_flash", "flex"]
Direction = Literal["forward", "backward"]

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
NO_BACKWARD: tuple[Kernel, ...] = ("mha_eval",)
"""torch takes its fast path of evaluation where no gradient is wanted, and there only."""

_HIDDEN = {"forward": 12, "backward": 22}
"""Arrays of the size of the input (sequences x tokens x width) that live at the peak, at most: measured, rounded up."""
_SCORES = {"forward": 3, "backward": 4}
"""The same for arrays of scores (sequences x heads x tokens x tokens), in kernels that write them out."""
_WRITES_NO_SCORES = {
    "forward": ("mha", "sdpa_flash", "flex"),
    "backward": ("mha", "sdpa_flash", "flex"),
}
_PROCESS_BYTES = 10**9
"""The interpreter, torch, and what a comparison with the reference takes besides."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One process of each round."""

    kernel: Kernel
    direction: Direction
    sequence: int

    @property
    def name(self) -> str:
        """Return what it is called in results and metrics."""
        return f"{self.kernel}/{self.direction}/{self.sequence}"

    def bytes_needed(self, *, batch: int, width: int, heads: int, value_bytes: int) -> int:
        """Return how much memory its process takes at most: an estimate that errs on the large side."""
        hidden, scores = batch * self.sequence * width, batch * heads * self.sequence**2
        num_scores = 0 if self.kernel in _WRITES_NO_SCORES[self.direction] else _SCORES[self.direction]
        compared = 4 * 8 * hidden  # output and gradient against a reference in fp64
        return value_bytes * (_HIDDEN[self.direction] * hidden + num_scores * scores) + compared + _PROCESS_BYTES
