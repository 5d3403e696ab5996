"""Measure a model: held-out loss, perplexity and speed of its forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.errors import ConfigError
from launcher.jobs.base import BatchedJob
from launcher.profile import ProfiledBy

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.context import Context


@dataclass(frozen=True, kw_only=True)
class Evaluate(BatchedJob):
    """Forward passes over the held-out split, under any strategy; nothing is learnt."""

    kind: ClassVar[str] = "evaluate"
    learns: ClassVar[bool] = False
    resumes: ClassVar[bool] = True

    eval_sequences: int = 64
    """Held-out sequences, over all ranks; fewer where the data has fewer."""

    repeats: int = 1
    """How often they are gone through; the first time also warms up, so speed is that of the fastest."""

    @property
    def profiled_by(self) -> ProfiledBy:
        """Its own steps."""
        return "steps"

    def problems(self) -> Iterator[ConfigError]:
        """Refuse counts that measure nothing."""
        yield from super().problems()
        yield from self.below(1, "eval_sequences", "repeats")

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the global batches of all repeats, the last of each perhaps not full."""
        return self.repeats * -(-self.eval_sequences // self.batch(run, world_size=world_size).global_)

    def run(self, context: Context) -> None:
        """Measure on this rank."""
        from launcher.training.preemption import Preemption

        Preemption().listen()  # there is nothing to save: whoever is asked leaves at once
        from launcher.training.measure import measure

        measure(self, context)
