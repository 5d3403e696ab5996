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
    """Service level objectives of a good answer; ``None`` sets no limit."""

    ttft_s: float | None = None
    """Time to first token."""
    tpot_s: float | None = None
    """Time per output token after the first."""
    e2el_s: float | None = None
    """End-to-end latency."""

    def is_met_by(self, outcome: RequestOutcome) -> bool:
        """Return whether the whole answer arrived within all limits."""
        if not outcome.is_good or not outcome.chunks_s:
            return False
        limits = (
            (self.ttft_s, outcome.ttft_s),
            (self.tpot_s, outcome.tpot_s or 0.0),
            (self.e2el_s, outcome.e2el_s),
        )
        return all(limit is None or value <= limit for limit, value in limits)


_COMMON_WORDS = """
the of and to in is that it was for on are with as his they be at one have this from or had by but some what there we
can out other were all your when up use word how said an each she which do their time if will way about many then them
would write like so these her long make thing see him two has look more day could go come did my sound no most number
who over know water than call first people may down side been now find
"""

PROMPT_WORDS = tuple(_COMMON_WORDS.split())
"""Common words that are one token each, with the space before them, in most vocabularies."""


def random_requests(
    *, seed: int, input_len: LengthDistribution, output_len: LengthDistribution
) -> Iterator[LoadRequest]:
    """Yield an endless stream of requests, the same for the same seed.

    Args:
        seed: of prompts and lengths.
        input_len: words of a prompt, about one token each.
        output_len: ``max_tokens``.
    """
    random_ = random.Random(seed)
    while True:
        prompt = " ".join(random_.choices(PROMPT_WORDS, k=input_len.draw(random_)))
        yield LoadRequest({"prompt": prompt, "max_tokens": output_len.draw(random_)})


def poisson_arrivals(*, seed: int, request_rate: float) -> Iterator[float]:
    """Yield the times of a Poisson process of ``request_rate`` requests a second."""
    random_, at_s = random.Random(seed), 0.0
    while True:
        at_s += random_.expovariate(request_rate)
        yield at_s


_PROGRESS_S = 0.5


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """The outcomes of one period of load."""

    outcomes: list[RequestOutcome]
    """In the order in which requests were due; those in flight at the end are ``unfinished``."""
    elapsed_s: float
    cpu_s: float
    """CPU seconds of this client, which a server on the same machine lacked."""


def closed_loop(
    target: LoadTarget,
    requests: Iterable[LoadRequest],
    *,
    max_concurrency: int,
    seconds: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> LoadResult:
    """Keep ``max_concurrency`` requests in flight: each that completes is followed by the next.

    Args:
        target: the server.
        requests: what to send, in this order.
        max_concurrency: requests in flight.
        seconds: length of the load; ``None`` runs until all requests have completed.
        progress: called periodically with the number of completed requests.
    """

    async def send_in_turn(
        source: Iterable[tuple[int, LoadRequest]], outcomes: list[RequestOutcome], start: float
    ) -> None:
        for number, request in source:
            outcome = RequestOutcome(number, due_s=time.perf_counter() - start)
            outcomes.append(outcome)
            await send_request(request, outcome, pool, start=start)

    pool = ConnectionPool(target)
    source = enumerate(requests)

    def make(outcomes: list[RequestOutcome], start: float) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(send_in_turn(source, outcomes, start)) for _ in range(max_concurrency)]

    return asyncio.run(_load(make, pool, seconds=seconds, progress=progress))


def open_loop(
    target: LoadTarget,
    requests: Iterable[LoadRequest],
    *,
    seconds: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> LoadResult:
    """Send each request when it is due (``LoadRequest.at_s``), however many are in flight.

    Latencies count from the due time. Arguments are those of ``closed_loop``; after ``seconds`` no request is sent, and
    those in flight are cancelled.
    """
    pool = ConnectionPool(target)

    async def send_when_due(outcomes: list[RequestOutcome], start: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                await asyncio.sleep(max(0.0, start + request.at_s - time.perf_counter()))
                outcome = RequestOutcome(number, due_s=request.at_s)
                outcomes.append(outcome)
                group.create_task(send_request(request, outcome, pool, start=start))

    def make(outcomes: list[RequestOutcome], start: float) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(send_when_due(outcomes, start))]

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
        left = _PROGRESS_S if seconds is None else min(_PROGRESS_S, max(0.0, start + seconds - time.perf_counter()))
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
    """Return the percentile ``share`` of values, as numpy's ``linear``; NaN without values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize_load(load: LoadResult, *, slo: Slo) -> dict[str, float]:
    """Return the figures of a period of load by name; times end in ``_s``.

    ``ttft`` is the time to first token, ``tpot`` the time per output token, ``itl`` the inter-token latency, ``e2el``
    the end-to-end latency. ``send_delay`` is the time from when a request was due to when it was sent.
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
        "client_cpu_share": load.cpu_s / load.elapsed_s,
        "send_delay_p99_s": percentile([outcome.sent_s - outcome.due_s for outcome in load.outcomes], 99),
    }
    answered = [outcome for outcome in good if outcome.chunks_s]
    columns = {
        "ttft": [outcome.ttft_s for outcome in answered],
        "tpot": [outcome.tpot_s for outcome in answered if outcome.tpot_s is not None],
        "itl": [gap for outcome in answered for gap in outcome.itl_s],
        "e2el": [outcome.e2el_s for outcome in answered],
    }
    for name, values in columns.items():
        found |= {f"{name}_p{share}_s": percentile(values, share) for share in PERCENTILES}
        found[f"{name}_mean_s"] = statistics.fmean(values) if values else math.nan
    return found | {f"error/{kind}": count for kind, count in sorted(errors.items())}


def tokens_between(outcomes: Sequence[RequestOutcome], from_s: float, to_s: float) -> float:
    """Return the tokens that arrived within an interval, those of unfinished answers included.

    A chunk may hold several tokens: it counts as its share of the tokens of its answer. The number of tokens of an
    unfinished answer is not known: its chunks count as the average chunk of the others.
    """
    answered = [outcome for outcome in outcomes if outcome.is_good and outcome.chunks_s]
    chunks = sum(len(outcome.chunks_s) for outcome in answered)
    average = sum(outcome.tokens for outcome in answered) / chunks if chunks else 1.0
    total = 0.0
    for outcome in outcomes:
        if outcome.chunks_s:
            worth = outcome.tokens / len(outcome.chunks_s) if outcome.is_good else average
            total += worth * sum(from_s <= at <= to_s for at in outcome.chunks_s)
    return total
