"""Keep a server busy: so many calls at a time, or calls that come when they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from launcher.benchmarks.load.calls import Call
from launcher.benchmarks.load.client import Pool, Target, carry_out
from launcher.benchmarks.load.outcome import Outcome

_BEAT_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a stretch of load came to."""

    outcomes: list[Outcome]
    """In the order in which calls were due; those that were under way at the end are ``unfinished``."""
    elapsed_s: float
    cpu_s: float
    """Processor seconds of this client: what it took from a server on the same machine."""


def closed_loop(
    target: Target,
    calls: Iterable[Call],
    *,
    concurrency: int,
    seconds: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Load:
    """Have ``concurrency`` calls under way at any time: each that ends makes room for the next.

    Args:
        target: whom to ask.
        calls: what to ask, in this order.
        concurrency: calls at a time.
        seconds: then break off; ``None`` goes on until all calls are done.
        progress: told from time to time how many calls are over.
    """

    async def one_after_the_other(source: Iterable[tuple[int, Call]], outcomes: list[Outcome], start: float) -> None:
        for number, call in source:
            outcome = Outcome(number, due_s=time.perf_counter() - start)
            outcomes.append(outcome)
            await carry_out(call, outcome, pool, start=start)

    pool = Pool(target)
    source = enumerate(calls)

    def make(outcomes: list[Outcome], start: float) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(one_after_the_other(source, outcomes, start)) for _ in range(concurrency)]

    return asyncio.run(_load(make, pool, seconds=seconds, progress=progress))


def open_loop(
    target: Target,
    calls: Iterable[Call],
    *,
    seconds: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Load:
    """Send each call when it is due (``Call.at_s``), however many are under way; latencies count from that time.

    Arguments are those of ``closed_loop``; after ``seconds`` no call is sent any more, and those under way are ended.
    """
    pool = Pool(target)

    async def as_they_come(outcomes: list[Outcome], start: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number, call in enumerate(calls):
                await asyncio.sleep(max(0.0, start + call.at_s - time.perf_counter()))
                outcome = Outcome(number, due_s=call.at_s)
                outcomes.append(outcome)
                group.create_task(carry_out(call, outcome, pool, start=start))

    def make(outcomes: list[Outcome], start: float) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(as_they_come(outcomes, start))]

    return asyncio.run(_load(make, pool, seconds=seconds, progress=progress))


async def _load(
    make: Callable[[list[Outcome], float], list[asyncio.Task[None]]],
    pool: Pool,
    *,
    seconds: float | None,
    progress: Callable[[int], None],
) -> Load:
    outcomes: list[Outcome] = []
    start, cpu = time.perf_counter(), time.process_time()
    tasks = make(outcomes, start)
    pending = set(tasks)
    while pending and (seconds is None or time.perf_counter() - start < seconds):
        left = _BEAT_S if seconds is None else min(_BEAT_S, max(0.0, start + seconds - time.perf_counter()))
        _, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.ALL_COMPLETED)
        progress(sum(bool(outcome.end_s) for outcome in outcomes))
    elapsed_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    for task in pending:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    pool.close()
    return Load(outcomes=outcomes, elapsed_s=elapsed_s, cpu_s=cpu_s)
