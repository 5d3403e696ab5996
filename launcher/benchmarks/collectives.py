"""The collectives benchmark on a rank: each message is checked, then timed."""

from __future__ import annotations

import math
import socket
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults, SizeSweep
from launcher.config.benchmark.distributed import VALUE_BYTES
from launcher.engines.distributed import barrier, choose_device, connect, disconnect, ranks_where
from launcher.errors import JobError
from launcher.protocol.metrics import MetricsWriter
from launcher.utils.text import bytes_text, counted

if TYPE_CHECKING:
    from launcher.config.benchmark.distributed import CollectivesBenchmark
    from launcher.engines.context import Context


_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""torch 2.13 has new names for them, and complains of the old ones."""

_PERIOD = 31
"""Number of distinct values in a message.
Sums over up to a thousand ranks stay exact in fp32, and values written to the wrong place differ, because no power of
two is a multiple of it."""


def run_collectives_benchmark(benchmark: CollectivesBenchmark, context: Context) -> BenchmarkResults:
    """Check and time every collective at every size, on every rank."""
    found = measure_collectives(benchmark, context)
    cases = {key: _case(*key, samples, context.world_size) for key, samples in found.seconds.items()}
    names = dict.fromkeys(name for name, _ in cases)
    lines = {name: {size: cases[name, size].samples for size in benchmark.sizes} for name in names}
    ranks = f"{context.world_size} ranks on {counted(len(found.hosts), 'host')}"
    return BenchmarkResults(
        benchmark=benchmark,
        cases=list(cases.values()),
        facts={case.name: {"bytes": _whole_values(size, context.world_size)} for (_, size), case in cases.items()},
        findings=tuple(_findings(benchmark, found, cases)),
        metrics=_metrics(cases, largest=benchmark.sizes[-1]),
        sweeps=[SizeSweep(title=f"{ranks}, {found.backend}", along="message, bytes", lines=lines)],
    )


def _findings(
    benchmark: CollectivesBenchmark, found: CollectiveTimings, cases: Mapping[tuple[str, int], BenchmarkCase]
) -> Iterator[str]:
    smallest, largest = benchmark.sizes[0], benchmark.sizes[-1]
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


def _whole_values(size: int, world_size: int) -> int:
    """Return the bytes of a message that has as many whole values for each rank."""
    return size // (VALUE_BYTES * world_size) * VALUE_BYTES * world_size


def bus_bandwidth_factor(name: str, world_size: int) -> float:
    """Return the ratio of bus bandwidth to algorithm bandwidth.

    The bus bandwidth is the one that hardware limits, independent of the number of ranks.

    From nccl-tests (doc/PERFORMANCE.md). The size of an all-gather is that of what comes out, of a reduce-scatter and
    an all-to-all that of what goes in, each on one rank.
    """
    others = (world_size - 1) / world_size
    return {"all_reduce": 2 * others, "broadcast": 1.0}.get(name, others)


def _case(name: str, size: int, seconds: Sequence[float], world_size: int) -> BenchmarkCase:

    speeds = [_whole_values(size, world_size) / taken / 1e9 for taken in seconds]
    share = bus_bandwidth_factor(name, world_size)
    samples: dict[str, Any] = {
        "call_us": tuple(1e6 * taken for taken in seconds),
        "algorithm_bandwidth_gb_per_s": tuple(speeds),
        "bus_bandwidth_gb_per_s": tuple(speed * share for speed in speeds),
    }
    return BenchmarkCase(name=f"{name}/{size}", samples=samples)


def _metrics(cases: Mapping[tuple[str, int], BenchmarkCase], *, largest: int) -> dict[str, float]:
    metrics = {}
    for (name, size), case in cases.items():
        metrics[f"{name}/{size}/call_us"] = case.median("call_us")
        if size == largest:
            metrics[f"{name}/bus_bandwidth_gb_per_s"] = case.median("bus_bandwidth_gb_per_s")
    return metrics


class Collective(ABC):
    """A message of fp32 values on this rank.

    Args:
        count: values of the larger side, input or output; a multiple of the number of ranks.
        device: where they are.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._pattern = (torch.arange(count, device=device) % _PERIOD + 1).to(torch.float32)
        share = count // self._world_size
        self._own = slice(self._rank * share, (self._rank + 1) * share)
        self.sent, self.received = self._buffers()

    def fill(self) -> None:
        """Put in what makes every rank's part known by its values, and zeros where results go."""
        self.received.zero_()
        self.sent.copy_(self._input())

    def clear(self) -> None:
        """Put in zeros, which stay zeros however often they are added."""
        self.received.zero_()
        self.sent.zero_()

    def num_wrong(self) -> int:
        """Return how many values are not what the call should have made of ``fill``."""
        return int((self.received != self._expected()).sum().item())

    @abstractmethod
    def call(self) -> None:
        """Do it once; on a GPU, ask for it."""

    @abstractmethod
    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Return the input and output tensors; one and the same for an in-place collective."""

    def _input(self) -> Tensor:
        """Return this rank's input: the pattern times its number, counted from 1."""
        return self._of(self._rank)[: self.sent.numel()]

    @abstractmethod
    def _expected(self) -> Tensor:
        """Return the correct output on this rank."""

    def _of(self, rank: int) -> Tensor:
        return self._pattern * (rank + 1)

    def _total(self) -> Tensor:
        return self._pattern * (self._world_size * (self._world_size + 1) // 2)

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self._pattern.device)


class AllReduce(Collective):
    """The sum of all ranks' messages, on every rank."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        both = self._empty(self._pattern.numel())
        return both, both

    def call(self) -> None:
        """Add up, in place."""
        dist.all_reduce(self.sent)

    def _expected(self) -> Tensor:
        return self._total()


class AllGather(Collective):
    """All ranks' shares one after the other, on every rank."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        return self._empty(self._pattern.numel() // self._world_size), self._empty(self._pattern.numel())

    def call(self) -> None:
        """Gather."""
        _all_gather(self.received, self.sent)

    def _expected(self) -> Tensor:
        return torch.cat([self._of(rank)[: self.sent.numel()] for rank in range(self._world_size)])


class ReduceScatter(Collective):
    """This rank's share of the sum of all ranks' messages."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        return self._empty(self._pattern.numel()), self._empty(self._pattern.numel() // self._world_size)

    def call(self) -> None:
        """Add up and scatter."""
        _reduce_scatter(self.received, self.sent)

    def _expected(self) -> Tensor:
        return self._total()[self._own]


class Broadcast(Collective):
    """The first rank's message, on every rank."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        both = self._empty(self._pattern.numel())
        return both, both

    def call(self) -> None:
        """Send or receive, in place."""
        dist.broadcast(self.sent, src=0)

    def _expected(self) -> Tensor:
        return self._of(0)


class AllToAll(Collective):
    """This rank's share of each rank's message, one after the other."""

    def _buffers(self) -> tuple[Tensor, Tensor]:
        return self._empty(self._pattern.numel()), self._empty(self._pattern.numel())

    def call(self) -> None:
        """Exchange."""
        dist.all_to_all_single(self.received, self.sent)

    def _expected(self) -> Tensor:
        return torch.cat([self._of(rank)[self._own] for rank in range(self._world_size)])


COLLECTIVES: dict[str, type[Collective]] = {
    "all_reduce": AllReduce,
    "all_gather": AllGather,
    "reduce_scatter": ReduceScatter,
    "broadcast": Broadcast,
    "all_to_all": AllToAll,
}

_FEWEST, _MOST = 3, 10_000
"""Calls in one measurement."""

_REFUSALS = ("does not support", "not implemented", "no support for")
"""Messages of torch's backends for a collective that they do not support."""


@dataclass(kw_only=True)
class CollectiveTimings:
    """Timings of the collectives, the same on every rank."""

    backend: str
    hosts: dict[str, int]
    """Ranks by name of their host."""
    lacking: dict[str, str] = field(default_factory=dict)
    """Why the backend does not offer a collective, by its name."""
    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """Time of one call in each round, by collective and size."""
    checks: int = 0
    """Messages of which every rank compared every value."""


def measure_collectives(benchmark: CollectivesBenchmark, context: Context) -> CollectiveTimings:
    """Check and time every collective at every size, A B A B, on all ranks together.

    Raises:
        JobError: on every rank, when some rank got a value that is wrong.
    """
    device = choose_device(context.local_rank)
    connect(context, device)
    found = CollectiveTimings(backend=dist.get_backend(), hosts=_hosts(context.world_size))
    found.lacking |= _lacking(benchmark, device)
    done, total, heartbeat = 0, benchmark.num_measurements, context.heartbeat.update
    with MetricsWriter(context.run_dir.metrics) if context.is_main else nullcontext() as metrics:
        for round_ in range(1, benchmark.repeats + 1):
            for size, name in ((size, name) for size in benchmark.sizes for name in benchmark.collectives):
                if name in found.lacking:
                    continue
                heartbeat("measure", done, steps=total)
                collective = COLLECTIVES[name](_count(size), device)
                _check(name, collective, size=size, device=device)
                taken_s = _time(collective, warmup=benchmark.warmup, seconds=benchmark.duration_s, device=device)
                found.seconds.setdefault((name, size), []).append(taken_s)
                found.checks += 1
                done += 1
                if metrics is not None:
                    metrics.record(done, **{f"benchmark/{name}/{size}/call_s": taken_s})
                    figures = f"{1e6 * taken_s:,.1f} µs a call"
                    print(f"round {round_}/{benchmark.repeats}  {name}, {size} bytes: {figures}", flush=True)
    disconnect()
    return found


def _count(size: int) -> int:
    """Return the number of values in a message of about ``size`` bytes, a multiple of the ranks."""
    world_size: int = dist.get_world_size()
    return size // (VALUE_BYTES * world_size) * world_size


def _hosts(world_size: int) -> dict[str, int]:
    names: list[str] = [""] * world_size
    dist.all_gather_object(names, socket.gethostname())
    return dict(Counter(names))


def _lacking(benchmark: CollectivesBenchmark, device: torch.device) -> dict[str, str]:
    """Return the backend's message for each collective that it does not support.

    The backend rejects the call before it sends anything.
    """
    lacking: dict[str, str] = {}
    for name in benchmark.collectives:
        collective = COLLECTIVES[name](dist.get_world_size(), device)
        collective.clear()
        try:
            collective.call()
        except RuntimeError as error:
            if not any(words in str(error).lower() for words in _REFUSALS):
                raise
            lacking[name] = str(error).strip().splitlines()[0]
    return lacking


def _check(name: str, collective: Collective, *, size: int, device: torch.device) -> None:
    """Do it once with values that are known.

    Raises:
        JobError: on every rank alike, when some rank got a wrong one.
    """
    collective.fill()
    barrier()
    collective.call()
    wrong = collective.num_wrong()
    if wrong:
        print(f"{name}, {size} bytes: {wrong} values are wrong on this rank", flush=True)
    ranks = ranks_where(wrong > 0, device=device)
    if ranks:
        where = ", ".join(map(str, ranks))
        raise JobError(
            f"{name} of {size} bytes gives wrong values on rank {where}; the logs of these ranks say how many"
        )


def _time(collective: Collective, *, warmup: int, seconds: float, device: torch.device) -> float:
    """Return the time of one call, repeated for about so many seconds."""
    collective.clear()
    for _ in range(warmup):
        collective.call()
    once = _time_calls(collective, _FEWEST, device)
    return _time_calls(collective, max(_FEWEST, min(_MOST, math.ceil(seconds / once))), device)


def _time_calls(collective: Collective, calls: int, device: torch.device) -> float:
    """Return the mean time of ``calls`` on the slowest rank, so that all ranks know the same."""
    barrier()
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        collective.call()
    _synchronise(device)
    mean = torch.tensor([(time.perf_counter() - started) / calls], dtype=torch.float64, device=device)
    dist.all_reduce(mean, op=dist.ReduceOp.MAX)
    return float(mean.item())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
