"""The benchmark group: fields and checks of every benchmark."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.config.component import Component
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.benchmarks.results import BenchmarkResults
    from launcher.config.run import Run
    from launcher.engines.context import Context


@dataclass(frozen=True, kw_only=True)
class Benchmark(Component):
    """A claim that is measured: cases that do the same work in different ways."""

    group: ClassVar[str] = "benchmark"

    max_ranks: ClassVar[int | None] = 1
    """The most ranks it can use."""

    how: ClassVar[str] = "each in a process of its own"
    """How its cases are kept apart, as its table tells it."""

    takes_few_bits: ClassVar[bool] = False
    """Whether the model may be quantised: it is asked for text, and not trained."""

    needs_model: ClassVar[bool] = False
    """Whether it is about the run's model, which otherwise has no say."""

    needs_data: ClassVar[bool] = False
    """Whether it is about the run's data."""

    repeats: int = 3
    """Times each case is measured, all cases in turn (A B A B), each time in a process of its own."""

    warmup: int = 1
    """Whole steps of a case before the one that is measured, in the same process."""

    @property
    def num_measurements(self) -> int:
        """How many processes are started; progress counts to it."""
        return self.repeats

    def problems(self) -> Iterator[ConfigError]:
        """Refuse counts that measure nothing."""
        yield from self.below(1, "repeats")
        yield from self.below(0, "warmup")

    @property
    def server_options(self) -> Mapping[str, Any] | None:
        """Options of the job=serve that it starts for itself; ``None`` where it starts none."""
        return None

    @property
    def train_options(self) -> Mapping[str, Any] | None:
        """Options of the job=train whose steps its cases take, which the runs that it is given then have as their job;
        ``None`` where they take none.
        """
        return None

    def refusals(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Yield why it cannot be measured with the rest of the run."""
        yield from ()

    def preflight(self) -> Iterator[ConfigError]:
        """Yield what this machine says against it."""
        yield from ()

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the parts of what is measured, each in words."""
        yield from ()

    @abstractmethod
    def run(self, context: Context) -> BenchmarkResults | None:
        """Measure, on every rank; what rank 0 returns is what is kept, and others need return nothing."""


@dataclass(frozen=True, kw_only=True)
class NoBenchmark(Component):
    """Nothing to measure: what jobs other than ``benchmark`` have here."""

    group: ClassVar[str] = "benchmark"
    kind: ClassVar[str] = "none"
