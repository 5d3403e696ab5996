"""One strategy to verify, and the run that it makes of the user's."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING

from launcher.batch import Batch, solve_batch
from launcher.errors import ConfigError
from launcher.parallel.family import family_refusals
from launcher.parallel.replicated import Single
from launcher.wording import component_text, times

if TYPE_CHECKING:
    from launcher.activation import Activation
    from launcher.config import Run
    from launcher.parallel.base import Parallel


@dataclass(frozen=True)
class Case:
    """What differs from the user's run; model, data, optimiser, steps and global batch never do."""

    parallel: Parallel
    _: KW_ONLY
    activation: Activation | None = None
    """Policy for activations; the run's own by default."""
    micro_batch: int | None = None
    """Sequences in one forward pass; by default as many as the run has, or as divide a rank's share."""
    ranks: int = 1
    """Fewest ranks that make it what its name says."""

    def batch(self, run: Run, *, world_size: int, sequences: int) -> Batch:
        """Return how ``world_size`` ranks go through a global batch of ``sequences``.

        Raises:
            ConfigError: they cannot share it out.
        """
        beside = self.parallel.data_parallel(world_size)
        wanted, share = self.micro_batch or run.batched_job.micro_batch, max(1, sequences // beside)
        return solve_batch(
            micro=max(size for size in range(1, min(wanted, share) + 1) if share % size == 0),
            global_=sequences,
            accumulation=self.parallel.accumulation,
            data_parallel=beside,
        )

    def apply(self, run: Run, *, world_size: int, sequences: int) -> Run:
        """Return the run that this case makes of ``run`` on that many ranks with that global batch."""
        batch = self.batch(run, world_size=world_size, sequences=sequences)
        job = replace(run.batched_job, micro_batch=batch.micro, global_batch=batch.global_, accumulation=None)
        return replace(run, parallel=self.parallel, activation=self.activation or run.activation, job=job)

    def misfit(self, run: Run, *, world_size: int, sequences: int) -> str | None:
        """Return why this case cannot be taken, or ``None`` when it can."""
        degrees = self.parallel.degrees(world_size)
        if world_size < self.ranks:
            return f"needs {times(self.ranks, 'rank')}"
        if degrees.product != world_size:
            return f"{degrees} does not fill {times(world_size, 'rank')}"
        length = run.batched_job.sequence_length
        if length % degrees.sequence:
            return f"job.sequence_length={length} does not divide over {degrees.sequence} ranks"
        shape = run.model.shape()
        for refusal in self.parallel.refusals(world_size, run.precision, optimizer=run.optimizer, shape=shape):
            return refusal.why
        for refusal in family_refusals(self.parallel, run.model, run.attention, world_size=world_size, length=length):
            return refusal.why
        try:
            batch = self.batch(run, world_size=world_size, sequences=sequences)
        except ConfigError as error:
            return error.why
        return next((refusal.why for refusal in self.parallel.batch_refusals(batch)), None)

    def describe(self, run: Run, *, world_size: int, sequences: int) -> str:
        """Return strategy, degrees and batch in words."""
        words = [component_text(self.parallel)]
        if not isinstance(self.parallel, Single):
            words.append(str(self.parallel.degrees(world_size)))
        if self.activation is not None:
            words.append(f"activation {component_text(self.activation)}")
        return ", ".join([*words, str(self.batch(run, world_size=world_size, sequences=sequences))])


REFERENCE = Case(Single())
"""One process, which all others are compared with."""
