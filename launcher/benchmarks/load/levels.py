"""One server, one level of load after the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.load.calls import Call, arrivals, drawn_calls, read_trace
from launcher.benchmarks.load.client import Target
from launcher.benchmarks.load.drive import Load, closed_loop, open_loop
from launcher.benchmarks.load.figures import figures
from launcher.benchmarks.load.http import Address, Connection, Trouble, parse_address
from launcher.benchmarks.load.lengths import parse_lengths
from launcher.benchmarks.load.own_server import own_server
from launcher.errors import JobError
from launcher.training.metrics import MetricsWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.benchmarks.serving import ServingBenchmark
    from launcher.context import Context

_SEEDS_A_ROUND = 1000
_SHOWN = ("requests", "errors", "tokens_per_s", "first_p50_s", "first_p99_s", "gap_p99_s", "client_share")


def measure_levels(benchmark: ServingBenchmark, context: Context) -> dict[str, list[dict[str, Any]]]:
    """Return the figures of each level by its name, one of each round.

    Raises:
        JobError: the server cannot be reached, or cannot be started.
    """
    found: dict[str, list[dict[str, Any]]] = {benchmark.name_of(level): [] for level in benchmark.levels}
    done, total = 0, benchmark.num_measurements
    server = contextlib.nullcontext(benchmark.url) if benchmark.url else own_server(benchmark.serve, context)
    with server as url, MetricsWriter(context.run_dir.metrics) as metrics:
        target = target_of(benchmark, url)
        for round_ in range(benchmark.repeats):
            for number, level in enumerate(benchmark.levels):
                seed = context.run.job.seed + _SEEDS_A_ROUND * round_ + number
                told = partial(_tell, context, done, total)
                load = put_under(benchmark, target, level, seed=seed, progress=told)
                answer = figures(load, slo=benchmark.slo)
                name = benchmark.name_of(level)
                found[name].append(answer)
                done += 1
                metrics.record(done, **{f"benchmark/{name}/{key}": value for key, value in answer.items()})
                words = ", ".join(f"{key} {answer[key]:,.4g}" for key in _SHOWN)
                print(f"round {round_ + 1}/{benchmark.repeats}  {name}: {words}", flush=True)
    return found


def _tell(context: Context, done: int, total: int, requests: int) -> None:
    context.heartbeat.beat("measure", done, steps=total, requests=requests)


def put_under(
    benchmark: ServingBenchmark, target: Target, level: float, *, seed: int, progress: Callable[[int], None]
) -> Load:
    """Put a server under one level of load."""
    calls = calls_of(benchmark, seed=seed)
    if benchmark.mode == "closed":
        return closed_loop(target, calls, concurrency=int(level), seconds=benchmark.seconds, progress=progress)
    times = arrivals(seed=seed + 1, rate=level)
    due = (Call(call.fields, at_s) for call, at_s in zip(calls, times, strict=False))
    return open_loop(target, due, seconds=benchmark.seconds, progress=progress)


def calls_of(benchmark: ServingBenchmark, *, seed: int) -> Iterator[Call]:
    """Return the calls of one level, without end."""
    if benchmark.trace is not None:
        return itertools.cycle(read_trace(Path(benchmark.trace).expanduser()))
    return drawn_calls(seed=seed, inputs=parse_lengths(benchmark.inputs), outputs=parse_lengths(benchmark.outputs))


def target_of(benchmark: ServingBenchmark, url: str) -> Target:
    """Return whom to ask.

    Raises:
        JobError: nobody answers there, or no model is named.
    """
    address, key = parse_address(url), os.environ.get(benchmark.key_variable, "")
    model = benchmark.served_name or first_model(address, key=key)
    return Target(address=address, model=model, extra=benchmark.extra, key=key)


def first_model(address: Address, *, key: str) -> str:
    """Return the first model that a server names."""

    async def ask() -> bytes:
        connection = Connection(address, headers={"Authorization": f"Bearer {key}"} if key else {})
        try:
            answer = await connection.get("/v1/models")
            body = await answer.body()
        finally:
            connection.close()
        if answer.status != 200:
            raise Trouble(str(answer.status), body[:200].decode(errors="replace"))
        return body

    try:
        return str(json.loads(asyncio.run(ask()))["data"][0]["id"])
    except (Trouble, ValueError, KeyError, IndexError, TypeError) as error:
        raise JobError(f"{address.base} names no model: {error}; set benchmark.served_name") from error
