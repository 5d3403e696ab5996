"""Context of a job on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.config.parallel.base import ParallelDims
from launcher.engines.preemption import Preemption
from launcher.profiling.profiler import NO_PROFILER, Profiler

if TYPE_CHECKING:
    from launcher.config.run import Run
    from launcher.protocol.heartbeat import Heartbeat
    from launcher.protocol.plan import Batch
    from launcher.protocol.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class Context:
    """One rank's view of the run."""

    run: Run
    run_dir: RunDir
    rank: int
    """Number of this rank among all, from 0."""
    local_rank: int
    """Number of this rank on its host, from 0; the index of its device."""
    world_size: int
    heartbeat: Heartbeat
    """Report progress here at each step: ``backend.stall_timeout_s`` of silence ends the run."""
    run_id: str = ""
    """Id of the run; empty for a rank that was started by hand."""
    profiler: Profiler = NO_PROFILER
    """Do each step in its ``step()``: it decides which of them it records."""
    preemption: Preemption = field(default_factory=Preemption)
    """Whether this rank must save and exit; it listens if ``job.handles_preemption`` is true."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes metrics, results and manifests."""
        return self.rank == 0

    @property
    def dims(self) -> ParallelDims:
        """How the run divides its ranks."""
        return self.run.parallel.dims(self.world_size)

    @property
    def data_rank(self) -> int:
        """Return this rank's share of every batch; ranks that split one sample have the same."""
        return self.dims.data_rank(self.rank)

    @property
    def batch(self) -> Batch:
        """The batch equation of the run, as the plan printed it."""
        return self.run.batched_job.batch(self.run, world_size=self.world_size)
