"""Load a server with twice its capacity for twenty minutes, with disconnects, invalid requests and killed engines.

    python scripts/bench/serving_soak.py --minutes 20 -- model=smollm2_135m precision=fp32

The words after ``--`` are overrides of the ``job=serve`` that is started here. Every prompt's greedy answer is computed
beforehand, alone; any other text under load is an error. The result cache is off: every answer is computed. At the end
SIGTERM is sent under load: every accepted request completes or gets an error, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from harness import describe_machine
from soak_server import REQUEST_TIMEOUT_S, SoakServer
from soak_watch import Watch

from launcher.benchmarks.load_client import (
    ConnectionPool,
    HttpConnection,
    LoadTarget,
    RequestError,
    RequestOutcome,
    send_request,
)
from launcher.benchmarks.load_generator import closed_loop, poisson_arrivals, random_requests
from launcher.config.benchmark.serving import (
    LoadRequest,
    parse_length_distribution,
    parse_server_address,
)

NUM_PROMPTS = 40
CANCELLED, MALFORMED = 0.10, 0.05
"""Shares of requests whose client disconnects, and of invalid requests."""
INVALID = (
    b"{",
    b"[]",
    b'{"prompt": "\xff", "max_tokens": 4}',
    b'{"model": "no such model", "prompt": "a", "max_tokens": 4}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "max_tokens": 1e99}',
    b'{"prompt": 5}',
    b'{"prompt": "a", "no_such_field": 1}',
    b'{"prompt": "' + b"word " * 100_000 + b'", "max_tokens": 4}',
)
_REFUSED = ("429", "503")
_LOST = ("cut", "timeout")
_CALIBRATE_S, _BUSY = 60.0, 64
_TERM_STORM_S, _TERM_AT = 20.0, 0.4
"""Longest duration of the load in which SIGTERM comes, and after which part of it."""
_TIMEOUT_S = REQUEST_TIMEOUT_S + 60.0
"""A client without an answer for this long was forgotten."""


@dataclass
class Tally:
    """What became of requests."""

    ends: bool = False
    """Whether the server receives SIGTERM meanwhile: then connections are refused in the end."""
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each kind that should not be."""

    def note(self, kind: str, why: str = "") -> None:
        """Count one."""
        self.counts[kind] += 1
        if why:
            self.examples.setdefault(kind, why)

    def note_outcome(self, outcome: RequestOutcome, expected: str) -> None:
        """Count a request that was to be answered."""
        if outcome.is_good:
            is_right = outcome.text == expected
            self.note("finished" if is_right else "MIXED", "" if is_right else f"{outcome.text!r}, not {expected!r}")
        elif outcome.error in _REFUSED:
            self.note("refused")
        elif outcome.error == "connect":
            self.note("connection refused" if self.ends else "LOST", "" if self.ends else outcome.why)
        elif outcome.error in _LOST:
            self.note("LOST", outcome.why)
        else:
            self.note("failed explicitly", outcome.why)

    def lines(self) -> Iterator[str]:
        """Yield counts, and an example of each kind that should not be."""
        yield from (f"{kind}: {count}" for kind, count in sorted(self.counts.items()))
        yield from (f"  {kind}: {why[:400]}" for kind, why in self.examples.items())


def answers_alone(target: LoadTarget, calls: list[LoadRequest]) -> list[str]:
    """Return the answer to each call, asked one after the other.

    Raises:
        RuntimeError: the server does not answer, or two prompts have the same answer.
    """
    outcomes = closed_loop(target, calls, max_concurrency=1).outcomes
    for outcome in outcomes:
        if not outcome.is_good:
            raise RuntimeError(f"asked alone: {outcome.why}")
    texts = [outcome.text for outcome in outcomes]
    if len(set(texts)) < len(texts):
        raise RuntimeError("two prompts have the same answer: a mix-up would go unnoticed")
    return texts


async def storm(
    target: LoadTarget,
    calls: list[LoadRequest],
    expected: list[str],
    *,
    rate: float,
    seconds: float,
    seed: int,
    tally: Tally,
) -> None:
    """Send requests at a rate, and see each to its end."""
    random_, pool, start = random.Random(seed), ConnectionPool(target), time.perf_counter()

    async def one(number: int) -> None:
        fate = random_.random()
        which = random_.randrange(len(calls))
        if fate < MALFORMED and not tally.ends:
            await _invalid(target, random_.choice(INVALID), tally)
            return
        outcome = RequestOutcome(number, due_s=time.perf_counter() - start)
        task = send_request(calls[which], outcome, pool, start=start)
        if fate < MALFORMED + CANCELLED:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(task, random_.expovariate(1 / 2.0))
            tally.note("cancelled" if outcome.error == "unfinished" else "ended before it was cancelled")
            return
        await task
        tally.note_outcome(outcome, expected[which])

    async with asyncio.TaskGroup() as group:
        for number, at_s in enumerate(poisson_arrivals(seed=seed, request_rate=rate)):
            if at_s > seconds:
                break
            await asyncio.sleep(max(0.0, start + at_s - time.perf_counter()))
            group.create_task(one(number))
    pool.close()


async def _invalid(target: LoadTarget, body: bytes, tally: Tally) -> None:
    """Send what must be refused with a status of the client's fault, in OpenAI's shape."""
    connection = HttpConnection(target.address, headers={})
    try:
        answer = await connection.post("/v1/completions", body)
        text = await answer.body()
        error = json.loads(text)["error"]
        if answer.status == 503 and error["code"] == "too_many_connections":  # before it was read
            tally.note("refused")
        elif 400 <= answer.status < 500 and "message" in error:
            tally.note("invalid refused")
        else:
            tally.note("INVALID ACCEPTED", f"{answer.status}: {text!r}")
    except RequestError as trouble:
        tally.note("INVALID LOST", f"{trouble} after {body[:60]!r}")
    except (ValueError, KeyError, TypeError) as error:
        tally.note("INVALID ACCEPTED", f"no error in OpenAI's shape after {body[:60]!r}: {error}")
    finally:
        connection.close()


async def storm_and_end(
    server: SoakServer,
    target: LoadTarget,
    calls: list[LoadRequest],
    expected: list[str],
    *,
    rate: float,
    seconds: float,
    seed: int,
    tally: Tally,
) -> int | None:
    """Send SIGTERM in the middle of a short storm; return the exit code."""

    async def end() -> int | None:
        await asyncio.sleep(seconds * _TERM_AT)
        return await asyncio.to_thread(server.terminate)

    async with asyncio.TaskGroup() as group:
        ended = group.create_task(end())
        await storm(target, calls, expected, rate=rate, seconds=seconds, seed=seed, tally=tally)
    return ended.result()


def main() -> int:
    """Run the storm and tell what came of it; the exit code is 1 where something should not have been."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--times", type=float, default=2.0, help="of the capacity that is measured first")
    parser.add_argument("--kill-every", type=float, default=120.0, help="seconds between engines that are killed")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--inputs", default="8-120", help="words of a prompt")
    parser.add_argument("--outputs", default="8-48", help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="of job=serve, after --")
    arguments = parser.parse_args()
    print(describe_machine("torch", "transformers"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        server = SoakServer(arguments.overrides, replicas=arguments.replicas, folder=Path(folder))
        try:
            return soak(server, arguments)
        finally:
            server.kill()


def soak(server: SoakServer, arguments: argparse.Namespace) -> int:
    """Do it to a server that has just been started."""
    server.wait_until_ready()
    target = LoadTarget(
        address=parse_server_address(server.url),
        model=server.model(),
        extra_body={"ignore_eos": True},
        timeout_s=_TIMEOUT_S,
        keep_text=True,
    )
    inputs, outputs = parse_length_distribution(arguments.inputs), parse_length_distribution(arguments.outputs)
    calls = list(islice(random_requests(seed=arguments.seed, input_len=inputs, output_len=outputs), NUM_PROMPTS))
    expected = answers_alone(target, calls)
    calibrate_s = min(_CALIBRATE_S, 60 * arguments.minutes)
    many = (calls[number % len(calls)] for number in range(10**9))
    busy = closed_loop(target, many, max_concurrency=_BUSY, seconds=calibrate_s)
    late = [outcome for outcome in busy.outcomes if outcome.is_good and outcome.end_s > calibrate_s / 3]  # all are busy
    capacity = len(late) / (busy.elapsed_s - calibrate_s / 3)
    rate, seconds = arguments.times * capacity, 60 * arguments.minutes
    print(f"capacity {capacity:.2f} requests/s; {rate:.2f} a second for {arguments.minutes:g} minutes", flush=True)
    tally = Tally()
    with Watch(server, kill_every_s=arguments.kill_every, finished=lambda: tally.counts["finished"]) as watch:
        asyncio.run(storm(target, calls, expected, rate=rate, seconds=seconds, seed=arguments.seed, tally=tally))
    left = server.wait_until_idle()
    last = Tally(ends=True)
    short = {"seconds": min(_TERM_STORM_S, seconds), "seed": arguments.seed + 1}
    code = asyncio.run(storm_and_end(server, target, calls, expected, rate=rate, tally=last, **short))
    print("\n".join(tally.lines()))
    print("\n".join(watch.lines()))
    print(f"requests left in engines afterwards: {left}")
    print("SIGTERM in the middle of the same load:")
    print("\n".join(f"  {line}" for line in last.lines()))
    print(f"  exit code {code}")
    wrong = [kind for kind in (*tally.counts, *last.counts) if kind.isupper()]
    good = not wrong and not left and code == 0 and watch.is_honest and watch.is_flat
    print("everything as it should be" if good else f"NOT as it should be: {', '.join(wrong) or 'see above'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
