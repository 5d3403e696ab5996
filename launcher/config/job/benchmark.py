"""Job benchmark: run the benchmark that the group `benchmark` selects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from launcher.config.job.train import Train
from launcher.config.profile import ProfileUnit
from launcher.config.run import COMPUTING_GROUPS, Benchmark, Job, Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.utils.schema import build


@dataclass(frozen=True, kw_only=True)
class BenchmarkJob(Job):
    """Run one benchmark and leave its results as JSON, Markdown and a picture."""

    kind: ClassVar[str] = "benchmark"

    @property
    def profile_unit(self) -> ProfileUnit:
        """Its cases, each once more."""
        return "cases"

    def validate(self) -> Iterator[ConfigError]:
        """Reject an invalid seed."""
        yield from self.validate_minimum(0, "seed")

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the measurements."""
        return run.benchmark.num_measurements if isinstance(run.benchmark, Benchmark) else 0

    def unused_groups(self, run: Run) -> frozenset[str]:
        """Return the groups that the benchmark does not measure with."""
        benchmark = run.benchmark
        if not isinstance(benchmark, Benchmark):
            return frozenset()  # rejected by another check
        used = {"model": benchmark.needs_model, "data": benchmark.needs_data}
        unused = COMPUTING_GROUPS - benchmark.used_groups
        return unused | {group for group, is_used in used.items() if not is_used}

    def unused_strategy(self, run: Run) -> str:
        """Return why a strategy is not measured."""
        benchmark = run.benchmark
        if not isinstance(benchmark, Benchmark) or benchmark.uses_parallel:
            return ""
        return f"benchmark={benchmark.kind} does not measure the strategy of the run"

    def names_itself(self, run: Run) -> str:
        """Return the benchmark."""
        return f"benchmark={run.benchmark.kind}"

    def max_ranks(self, run: Run) -> int | None:
        """Return the most ranks that the benchmark and the strategy have work for."""
        limits = (super().max_ranks(run), run.benchmark.max_ranks if isinstance(run.benchmark, Benchmark) else None)
        return min((limit for limit in limits if limit is not None), default=None)

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject a run that names nothing to measure, or has ranks that would have nothing to do."""
        benchmark = run.benchmark
        if not isinstance(benchmark, Benchmark):
            why = "job=benchmark needs a benchmark to run"
            yield ConfigError("benchmark", "none", why=why, fix="set benchmark=activation")
            return
        yield from benchmark.validate_run(self.measured_run(run), world_size=world_size)
        if benchmark.max_ranks is not None and world_size > benchmark.max_ranks:
            why = f"benchmark={benchmark.kind} measures on {benchmark.max_ranks} of the {world_size} ranks"
            yield ConfigError(
                "backend.ranks", world_size, why=why, fix=f"set backend.ranks={benchmark.max_ranks}, on one host"
            )
        elif benchmark.server_options is not None:
            from launcher.config.job.serve import Serve

            mistakes: list[ConfigError] = []
            build(Serve, benchmark.server_options, path="benchmark.serve", report=mistakes.append)
            yield from mistakes

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield the errors of the benchmark, its model and its data on this machine."""
        yield from super().validate_machine(run, run_dir)
        if isinstance(run.benchmark, Benchmark):
            yield from run.benchmark.validate_machine()
            if run.benchmark.needs_model:
                yield from run.model.validate_machine()
            if run.benchmark.needs_data:
                yield from run.data.validate_machine()

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the parts of the benchmark."""
        if isinstance(run.benchmark, Benchmark):
            yield from run.benchmark.describe(self.measured_run(run))

    def measured_run(self, run: Run) -> Run:
        """Return the run that is measured: one that trains, if the cases take optimizer steps."""
        options = run.benchmark.train_options if isinstance(run.benchmark, Benchmark) else None
        return run if options is None else replace(run, job=Train(seed=self.seed, **options))

    def files(self) -> Iterator[str]:
        """Yield the results, for programs and for people."""
        yield from ("benchmark.json", "benchmark.md", "benchmark.png")
