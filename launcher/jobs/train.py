"""Train a causal language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.errors import ConfigError
from launcher.jobs.base import Job

if TYPE_CHECKING:
    from launcher.context import Context


@dataclass(frozen=True, kw_only=True)
class Train(Job):
    """Next-token training with evaluation on a held-out split."""

    kind: ClassVar[str] = "train"

    steps: int = 300
    """Optimiser steps in the whole run; a resumed run continues up to this number."""

    micro_batch: int = 8
    """Sequences in one forward pass of one rank."""

    global_batch: int | None = None
    """Sequences in one optimiser step over all ranks: micro_batch x accumulation x data-parallel size."""

    accumulation: int | None = None
    """Forward passes per optimiser step and rank; give this or ``global_batch``. Neither means 1."""

    sequence_length: int = 128
    """Tokens in one sequence."""

    clip_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 leaves gradients as they are."""

    eval_every: int = 50
    """Optimiser steps between evaluations; 0 evaluates only at the end."""

    eval_sequences: int = 64
    """Held-out sequences in one evaluation, over all ranks."""

    log_every: int = 10
    """Optimiser steps between printed lines; metrics are recorded at every step."""

    sample_prompt: str = "The"
    """Text that the sample at the end of the run continues."""

    sample_tokens: int = 48
    """Length of that sample in tokens; 0 takes none."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse counts that make no training run."""
        yield from self.below(1, "steps", "micro_batch", "global_batch", "accumulation", "log_every", "eval_sequences")
        yield from self.below(2, "sequence_length")
        yield from self.below(0, "seed", "clip_norm", "eval_every", "sample_tokens")

    def run(self, context: Context) -> None:
        """Train on this rank."""
        from launcher.training.preemption import Preemption

        preemption = Preemption()
        preemption.listen()  # first: importing torch alone takes seconds
        from launcher.training.loop import train

        train(self, context, preemption)
