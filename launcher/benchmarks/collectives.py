"""Collectives of the run's ranks: latency and bandwidth by size of the message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from launcher.benchmarks.base import Benchmark
from launcher.errors import ConfigError
from launcher.wording import bytes_text, times

if TYPE_CHECKING:
    from launcher.benchmarks.exchange import Exchanged
    from launcher.benchmarks.results import Case, Results
    from launcher.config import Run
    from launcher.context import Context

Name = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"]

VALUE_BYTES = 4
"""Messages are made of fp32."""


def bus_share(name: str, world_size: int) -> float:
    """Return the bus bandwidth per algorithm bandwidth: what hardware alone limits, at any number of ranks.

    From nccl-tests (doc/PERFORMANCE.md). The size of an all-gather is that of what comes out, of a reduce-scatter and
    an all-to-all that of what goes in, each on one rank.
    """
    others = (world_size - 1) / world_size
    return {"all_reduce": 2 * others, "broadcast": 1.0}.get(name, others)


@dataclass(frozen=True, kw_only=True)
class CollectivesBenchmark(Benchmark):
    """Every collective at every size on all ranks of the run: NCCL between GPUs, Gloo between CPUs; results checked."""

    kind: ClassVar[str] = "collectives"
    headline: ClassVar[tuple[str, ...]] = ("smallest_bytes", "largest_bytes", "factor")
    max_ranks: ClassVar[int | None] = None
    how: ClassVar[str] = "all in turn, in the run's own ranks; a time is that of the slowest rank"

    collectives: tuple[Name, ...] = get_args(Name)
    """What is measured, on fp32 values."""

    smallest_bytes: int = 1024
    """Size of the smallest message; nccl-tests' definition of size."""

    largest_bytes: int = 64 * 2**20
    """Size of the largest message."""

    factor: int = 4
    """From one size to the next."""

    seconds: float = 0.2
    """About how long each collective is repeated at each size in each round, but 3 times at least."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse sizes and times that measure nothing."""
        yield from super().problems()
        yield from self.below(VALUE_BYTES, "smallest_bytes")
        yield from self.below(2, "factor")
        if self.largest_bytes < self.smallest_bytes:
            why = f"is below benchmark.smallest_bytes={self.smallest_bytes}"
            yield self.refuse("largest_bytes", why, f"set benchmark.largest_bytes={self.smallest_bytes}")
        if self.seconds <= 0:
            yield self.refuse("seconds", "must be above 0", "set benchmark.seconds=0.2")
        if not self.collectives or len(set(self.collectives)) < len(self.collectives):
            yield self.refuse("collectives", "names nothing, or something twice", "leave benchmark.collectives out")

    def refusals(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Refuse one rank, and messages that have no value for each rank."""
        if world_size < 2:
            why = "a collective takes at least 2 ranks"
            also = " parallel=ddp" if run.parallel.max_ranks == 1 else ""
            yield ConfigError("backend.ranks", world_size, why=why, fix=f"set backend.ranks=2{also}")
        elif self.smallest_bytes < VALUE_BYTES * world_size:
            least = VALUE_BYTES * world_size
            why = f"{world_size} ranks x {VALUE_BYTES} bytes = {least}"
            yield self.refuse("smallest_bytes", why, f"set benchmark.smallest_bytes={least}")

    @property
    def sizes(self) -> list[int]:
        """Sizes of messages in bytes, from the smallest on."""
        sizes = [self.smallest_bytes]
        while sizes[-1] * self.factor <= self.largest_bytes:
            sizes.append(sizes[-1] * self.factor)
        return sizes

    @property
    def num_measurements(self) -> int:
        """Each collective at each size in each round."""
        return self.repeats * len(self.sizes) * len(self.collectives)

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the collectives and the sizes."""
        yield "collectives", ", ".join(self.collectives)
        yield "messages", ", ".join(map(bytes_text, self.sizes))

    def run(self, context: Context) -> Results:
        """Check and time every collective at every size, on every rank."""
        from launcher.benchmarks.exchange import exchange
        from launcher.benchmarks.results import Results
        from launcher.benchmarks.sweep import Sweep

        found = exchange(self, context)
        cases = {key: _case(*key, samples, context.world_size) for key, samples in found.seconds.items()}
        names = dict.fromkeys(name for name, _ in cases)
        lines = {name: {size: cases[name, size].samples for size in self.sizes} for name in names}
        ranks = f"{context.world_size} ranks on {times(len(found.hosts), 'host')}"
        return Results(
            benchmark=self,
            cases=list(cases.values()),
            facts={case.name: {"bytes": _whole(size, context.world_size)} for (_, size), case in cases.items()},
            said=tuple(self._said(found, cases)),
            metrics=_metrics(cases, largest=self.sizes[-1]),
            sweeps=[Sweep(title=f"{ranks}, {found.backend}", along="message, bytes", lines=lines)],
        )

    def _said(self, found: Exchanged, cases: Mapping[tuple[str, int], Case]) -> Iterator[str]:
        smallest, largest = self.sizes[0], self.sizes[-1]
        for name in dict.fromkeys(name for name, _ in cases):
            algorithm, bus = (
                cases[name, largest].median(key) for key in ("algorithm_bandwidth_gb_per_s", "bus_bandwidth_gb_per_s")
            )
            yield (
                f"{name}: {cases[name, smallest].median('call_us'):,.1f} µs for {bytes_text(smallest)}; "
                f"bus bandwidth {bus:.3f} GB/s (algorithm {algorithm:.3f}) at {bytes_text(largest)}"
            )
        yield from (f"left out: {name}: {why}" for name, why in found.lacking.items())
        yield f"values: every result was checked on every rank {found.checks:,} times, and was right"
        places = ", ".join(f"{count} on {host}" for host, count in found.hosts.items())
        yield f"ranks: {places}; backend {found.backend}"


def _whole(size: int, world_size: int) -> int:
    """Return the bytes of a message that has as many whole values for each rank."""
    return size // (VALUE_BYTES * world_size) * VALUE_BYTES * world_size


def _case(name: str, size: int, seconds: Sequence[float], world_size: int) -> Case:
    from launcher.benchmarks.results import Case

    speeds = [_whole(size, world_size) / taken / 1e9 for taken in seconds]
    share = bus_share(name, world_size)
    samples: dict[str, Any] = {
        "call_us": tuple(1e6 * taken for taken in seconds),
        "algorithm_bandwidth_gb_per_s": tuple(speeds),
        "bus_bandwidth_gb_per_s": tuple(speed * share for speed in speeds),
    }
    return Case(name=f"{name}/{size}", samples=samples)


def _metrics(cases: Mapping[tuple[str, int], Case], *, largest: int) -> dict[str, float]:
    metrics = {}
    for (name, size), case in cases.items():
        metrics[f"{name}/{size}/call_us"] = case.median("call_us")
        if size == largest:
            metrics[f"{name}/bus_bandwidth_gb_per_s"] = case.median("bus_bandwidth_gb_per_s")
    return metrics
