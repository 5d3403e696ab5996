"""The ranks' side of the benchmark of collectives: each message is checked, then timed."""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from launcher.benchmarks.collective import COLLECTIVES, Collective
from launcher.engines.distributed import barrier, choose_device, connect, disconnect, ranks_where
from launcher.errors import JobError
from launcher.training.metrics import MetricsWriter

if TYPE_CHECKING:
    from launcher.benchmarks.collectives import CollectivesBenchmark
    from launcher.context import Context

_FEWEST, _MOST = 3, 10_000
"""Calls in one measurement."""
_VALUE_BYTES = 4
_REFUSALS = ("does not support", "not implemented", "no support for")
"""What torch's backends say of a collective that they do not have."""


@dataclass(kw_only=True)
class Exchanged:
    """What was found, the same on every rank."""

    backend: str
    hosts: dict[str, int]
    """Ranks by name of their host."""
    lacking: dict[str, str] = field(default_factory=dict)
    """Why the backend does not offer a collective, by its name."""
    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """Time of one call in each round, by collective and size."""
    checks: int = 0
    """Messages of which every rank compared every value."""


def exchange(benchmark: CollectivesBenchmark, context: Context) -> Exchanged:
    """Check and time every collective at every size, A B A B, on all ranks together.

    Raises:
        JobError: on every rank, when some rank got a value that is wrong.
    """
    device = choose_device(context.local_rank)
    connect(context, device)
    found = Exchanged(backend=dist.get_backend(), hosts=_hosts(context.world_size))
    found.lacking |= _lacking(benchmark, device)
    done, total, beat = 0, benchmark.num_measurements, context.heartbeat.beat
    with MetricsWriter(context.run_dir.metrics) if context.is_main else nullcontext() as metrics:
        for round_ in range(1, benchmark.repeats + 1):
            for size, name in ((size, name) for size in benchmark.sizes for name in benchmark.collectives):
                if name in found.lacking:
                    continue
                beat("measure", done, steps=total)
                collective = COLLECTIVES[name](_count(size), device)
                _check(name, collective, size=size, device=device)
                taken_s = _time(collective, warmup=benchmark.warmup, seconds=benchmark.seconds, device=device)
                found.seconds.setdefault((name, size), []).append(taken_s)
                found.checks += 1
                done += 1
                if metrics is not None:
                    metrics.record(done, **{f"benchmark/{name}/{size}/call_s": taken_s})
                    told = f"{1e6 * taken_s:,.1f} µs a call"
                    print(f"round {round_}/{benchmark.repeats}  {name}, {size} bytes: {told}", flush=True)
    disconnect()
    return found


def _count(size: int) -> int:
    """Return how many values a message of about ``size`` bytes has: as many whole ones for each rank."""
    world_size: int = dist.get_world_size()
    return size // (_VALUE_BYTES * world_size) * world_size


def _hosts(world_size: int) -> dict[str, int]:
    names: list[str] = [""] * world_size
    dist.all_gather_object(names, socket.gethostname())
    return dict(Counter(names))


def _lacking(benchmark: CollectivesBenchmark, device: torch.device) -> dict[str, str]:
    """Return the backend's own words for each collective that it does not have; it refuses before it sends anything."""
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
