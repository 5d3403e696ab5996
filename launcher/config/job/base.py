"""Options that every job has, and those of jobs that work through global batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.config.batch import solve_batch
from launcher.config.component import Component
from launcher.config.profile import ProfileUnit
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch

if TYPE_CHECKING:
    from launcher.config.run import Run
    from launcher.engines.context import Context
    from launcher.protocol.rundir import RunDir

LEARNING_GROUPS = frozenset({"optimizer", "schedule", "activation"})
"""Groups that only optimiser steps use."""


@dataclass(frozen=True, kw_only=True)
class Job(Component):
    """One piece of work that every rank of a run does together."""

    group: ClassVar[str] = "job"

    saves: ClassVar[bool] = False
    """Whether it writes checkpoints."""

    resumes: ClassVar[bool] = False
    """Whether it loads the checkpoint that ``checkpoint.resume`` names."""

    ends_when_told: ClassVar[bool] = False
    """Whether it has no end of its own, so that being told to end (SIGTERM, Ctrl-C) is how it completes."""

    seed: int = 0
    """Seed of weights, sample order and sampling. The same seed gives the same samples on any number of ranks."""

    @property
    def widens_bf16(self) -> bool:
        """Whether it computes with bf16 weights by kernels of its own, fast on processors without such instructions."""
        return False

    @property
    def optimizer_steps(self) -> int | None:
        """Optimiser steps over which the learning rate follows its schedule; ``None`` where none are taken."""
        return None

    @property
    def profiled_by(self) -> ProfileUnit:
        """What the recording of ``profile=true`` is measured in."""
        return "time"

    @abstractmethod
    def run(self, context: Context) -> None:
        """Do the work on this rank; raise to fail the run."""

    @abstractmethod
    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the number of steps of the work: global batches, or the unit that this job counts."""

    @property
    def grace_s(self) -> float:
        """Time that ranks get at least to end once they are told to."""
        return 0.0

    def max_ranks(self, run: Run) -> int | None:
        """Return the most ranks that it can use; ``backend.ranks=auto`` takes no more."""
        return run.parallel.max_ranks

    def batch(self, run: Run, *, world_size: int) -> Batch | None:
        """Return the batch of a step; ``None`` where there is none."""
        return None

    def unused_groups(self, run: Run) -> frozenset[str]:
        """Return the groups whose options have no effect on this job; one that a user types is refused."""
        return frozenset({"benchmark"})

    def refusals(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Yield why this job cannot be done with the rest of the run."""
        yield from ()

    def preflight(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield what this machine says against it: files, packages, ports."""
        yield from ()

    def notes(self, run: Run, *, world_size: int) -> Iterator[str]:
        """Yield what a user should know of what it will do, and not do."""
        yield from ()

    def outline(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the parts that the work has besides its batches, each with what is done in it."""
        yield from ()

    def files(self) -> Iterator[str]:
        """Yield what it leaves in the run directory besides what every run leaves."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class BatchedJob(Job):
    """A job that goes through global batches on an engine; what it does not say otherwise, it trains."""

    learns: ClassVar[bool] = True
    """Whether it takes optimiser steps; else learning rate, gradients and moments are no part of it."""

    micro_batch: int = 8
    """Sequences in one forward pass of one rank."""

    global_batch: int | None = None
    """Sequences in one step over all ranks: micro_batch x accumulation x data-parallel size."""

    accumulation: int | None = None
    """Forward passes per step and rank; give this or ``global_batch``. Neither means 1, or what fills a pipeline."""

    sequence_length: int = 128
    """Tokens in one sequence."""

    @property
    def clip_norm(self) -> float:
        """Largest global L2 norm of the gradient; 0 leaves gradients as they are."""
        return 0.0

    def unused_groups(self, run: Run) -> frozenset[str]:
        """Add what only optimiser steps use, where none are taken."""
        return super().unused_groups(run) | (frozenset() if self.learns else LEARNING_GROUPS)

    def problems(self) -> Iterator[ConfigError]:
        """Refuse counts that make no batch."""
        yield from self.below(1, "micro_batch", "global_batch", "accumulation")
        yield from self.below(2, "sequence_length")
        yield from self.below(0, "seed")

    def batch(self, run: Run, *, world_size: int) -> Batch:
        """Return how ``world_size`` ranks go through one global batch.

        Raises:
            ConfigError: it does not come out even.
        """
        return solve_batch(
            micro=self.micro_batch,
            global_=self.global_batch,
            accumulation=run.parallel.accumulation or self.accumulation,
            data_parallel=run.parallel.data_parallel(world_size),
            usual=run.parallel.usual_accumulation,
        )


@dataclass(frozen=True, kw_only=True)
class LearningJob(BatchedJob):
    """A job that takes optimiser steps."""

    steps: int
    """Optimiser steps."""

    clip_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 leaves gradients as they are."""

    @property
    def optimizer_steps(self) -> int:
        """All of them."""
        return self.steps

    def problems(self) -> Iterator[ConfigError]:
        """Refuse counts that make no step."""
        yield from super().problems()
        yield from self.below(1, "steps")
        yield from self.below(0, "clip_norm")
