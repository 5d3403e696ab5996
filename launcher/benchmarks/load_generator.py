"""Generate load in a closed or open loop; report latencies, throughput and goodput."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from launcher.benchmarks.load_client import ConnectionPool, LoadTarget, RequestOutcome, send_request
from launcher.config.benchmark.serving import LengthDistribution, LoadRequest


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What an answer must keep to be a good one; ``None`` asks for nothing."""

    ttft_s: float | None = None
    """Time to the first token."""
    tpot_s: float | None = None
    """Mean time a token after it."""
    e2e_latency_s: float | None = None
    """Time to the end."""

    def is_met_by(self, outcome: RequestOutcome) -> bool:
        """Return whether a whole answer came, in time."""
        if not outcome.is_good or not outcome.chunks_s:
            return False
        found = (
            (self.ttft_s, outcome.ttft_s),
            (self.tpot_s, outcome.tpot_s or 0.0),
            (self.e2e_latency_s, outcome.e2e_latency_s),
        )
        return all(most is None or value <= most for most, value in found)


_COMMON_WORDS = """
the of and to in is that it was for on are with as his they be at one have this from or had by but some what there we
can out other were all your when up use word how said an each she which do their time if will way about many then them
would write like so these her long make thing see him two has look more day could go come did my sound no most number
who over know water than call first people may down side been now find
"""


PROMPT_WORDS = tuple(_COMMON_WORDS.split())
"""Common words that are one token each, with the space before them, in the vocabulary of any language model."""


def random_requests(*, seed: int, inputs: LengthDistribution, outputs: LengthDistribution) -> Iterator[LoadRequest]:
    """Yield calls without end, the same ones for the same seed.

    Args:
        seed: of everything.
        inputs: words of a prompt, which is about its tokens.
        outputs: ``max_tokens``.
    """
    random_ = random.Random(seed)
    while True:
        prompt = " ".join(random_.choices(PROMPT_WORDS, k=inputs.draw(random_)))
        yield LoadRequest({"prompt": prompt, "max_tokens": outputs.draw(random_)})


def poisson_arrivals(*, seed: int, rate: float) -> Iterator[float]:
    """Yield the times of a Poisson process: ``rate`` calls a second, gaps exponentially distributed."""
    random_, at_s = random.Random(seed), 0.0
    while True:
        at_s += random_.expovariate(rate)
        yield at_s


_BEAT_S = 0.5


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What a stretch of load came to."""

    outcomes: list[RequestOutcome]
    """In the order in which calls were due; those that were under way at the end are ``unfinished``."""
    elapsed_s: float
    cpu_s: float
    """Processor seconds of this client: what it took from a server on the same machine."""


def closed_loop(
    target: LoadTarget,
    calls: Iterable[LoadRequest],
    *,
    concurrency: int,
    seconds: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> LoadResult:
    """Have ``concurrency`` calls under way at any time: each that ends makes room for the next.

    Args:
        target: whom to ask.
        calls: what to ask, in this order.
        concurrency: calls at a time.
        seconds: then break off; ``None`` goes on until all calls are done.
        progress: told from time to time how many calls are over.
    """

    async def one_after_the_other(
        source: Iterable[tuple[int, LoadRequest]], outcomes: list[RequestOutcome], start: float
    ) -> None:
        for number, call in source:
            outcome = RequestOutcome(number, due_s=time.perf_counter() - start)
            outcomes.append(outcome)
            await send_request(call, outcome, pool, start=start)

    pool = ConnectionPool(target)
    source = enumerate(calls)

    def make(outcomes: list[RequestOutcome], start: float) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(one_after_the_other(source, outcomes, start)) for _ in range(concurrency)]

    return asyncio.run(_load(make, pool, seconds=seconds, progress=progress))


def open_loop(
    target: LoadTarget,
    calls: Iterable[LoadRequest],
    *,
    seconds: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> LoadResult:
    """Send each call when it is due (``Call.at_s``), however many are under way; latencies count from that time.

    Arguments are those of ``closed_loop``; after ``seconds`` no call is sent any more, and those under way are ended.
    """
    pool = ConnectionPool(target)

    async def as_they_come(outcomes: list[RequestOutcome], start: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number, call in enumerate(calls):
                await asyncio.sleep(max(0.0, start + call.at_s - time.perf_counter()))
                outcome = RequestOutcome(number, due_s=call.at_s)
                outcomes.append(outcome)
                group.create_task(send_request(call, outcome, pool, start=start))

    def make(outcomes: list[RequestOutcome], start: float) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(as_they_come(outcomes, start))]

    return asyncio.run(_load(make, pool, seconds=seconds, progress=progress))


async def _load(
    make: Callable[[list[RequestOutcome], float], list[asyncio.Task[None]]],
    pool: ConnectionPool,
    *,
    seconds: float | None,
    progress: Callable[[int], None],
) -> LoadResult:
    outcomes: list[RequestOutcome] = []
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
    return LoadResult(outcomes=outcomes, elapsed_s=elapsed_s, cpu_s=cpu_s)


PERCENTILES = (50, 90, 95, 99)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` percent lie, between neighbours where need be (numpy's ``linear``)."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize_load(load: LoadResult, *, slo: Slo) -> dict[str, float]:
    """Return the figures of a stretch of load by name; times end in ``_s``.

    ``first`` is the time to the first token, ``per_token`` the mean time a token after it, ``gap`` the time between one
    piece of a stream and the next, ``whole`` the time to the end. ``late`` is how much later than due a call was sent.
    """
    good = [outcome for outcome in load.outcomes if outcome.is_good]
    errors = Counter(outcome.error for outcome in load.outcomes if not outcome.is_good)
    found: dict[str, float] = {
        "requests": len(good),
        "errors": sum(count for kind, count in errors.items() if kind != "unfinished"),
        "unfinished": errors.get("unfinished", 0),
        "elapsed_s": load.elapsed_s,
        "requests_per_s": len(good) / load.elapsed_s,
        "goodput_per_s": sum(map(slo.is_met_by, load.outcomes)) / load.elapsed_s,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "tokens_per_s": tokens_between(load.outcomes, 0.0, load.elapsed_s) / load.elapsed_s,
        "client_share": load.cpu_s / load.elapsed_s,
        "late_p99_s": percentile([outcome.sent_s - outcome.due_s for outcome in load.outcomes], 99),
    }
    told = [outcome for outcome in good if outcome.chunks_s]
    columns = {
        "first": [outcome.ttft_s for outcome in told],
        "per_token": [outcome.tpot_s for outcome in told if outcome.tpot_s is not None],
        "gap": [gap for outcome in told for gap in outcome.itl_s],
        "whole": [outcome.e2e_latency_s for outcome in told],
    }
    for name, values in columns.items():
        found |= {f"{name}_p{share}_s": percentile(values, share) for share in PERCENTILES}
        found[f"{name}_mean_s"] = statistics.fmean(values) if values else math.nan
    return found | {f"error/{kind}": count for kind, count in sorted(errors.items())}


def tokens_between(outcomes: Sequence[RequestOutcome], from_s: float, to_s: float) -> float:
    """Return the tokens that came within a stretch of time, those of answers cut off at its end included.

    A piece of a stream may hold several tokens: each counts as its share of those of its answer, and where an answer
    never told how many those are, as the others' pieces on average.
    """
    told = [outcome for outcome in outcomes if outcome.is_good and outcome.chunks_s]
    pieces = sum(len(outcome.chunks_s) for outcome in told)
    usual = sum(outcome.tokens for outcome in told) / pieces if pieces else 1.0
    total = 0.0
    for outcome in outcomes:
        if outcome.chunks_s:
            worth = outcome.tokens / len(outcome.chunks_s) if outcome.is_good else usual
            total += worth * sum(from_s <= at <= to_s for at in outcome.chunks_s)
    return total
