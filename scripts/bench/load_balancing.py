"""Two servers behind nginx and HAProxy under load: one killed, one drained, both replaced.

    python scripts/bench/load_balancing.py --requests 400 -- job.echo_step_s=0.02

Each load balancer gets 16 streams at a time in a closed loop, from the first phase to the last. It prints, for each
phase, how many requests ended, failed before their first token (none may) or were cut after it, and their latencies.
The words after ``--`` are overrides of the two servers; by default they echo prompts, a token in 20 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from harness import print_machine
from load_balancer import KINDS, SERVER, LoadBalancer
from soak_server import SoakServer

from launcher.benchmarks.load_client import HttpConnection, LoadTarget, RequestOutcome
from launcher.benchmarks.load_generator import LoadResult, closed_loop, random_requests
from launcher.config.benchmark.serving import LoadRequest, parse_length_distribution, parse_server_address
from launcher.utils.system import free_port

CONCURRENCY = 16
_WAIT_S = 600.0
PHASES = ("two servers", "one killed", "killed one replaced", "other one drained", "drained one replaced")


class Replica(Protocol):
    """A server that the rehearsal ends."""

    def kill(self) -> None:
        """End all its processes by SIGKILL, as a loss of power does."""

    def terminate(self) -> int | None:
        """Send SIGTERM, on which it drains; return its exit code."""


class OneRequestTarget(LoadTarget):
    """A target with a connection for each request, so that the client itself never sends one twice."""

    def connection(self) -> HttpConnection:
        """Return a connection that is closed after one request."""
        return HttpConnection(self.address, headers={"Connection": "close"})


class Stream(threading.Thread):
    """Load on one load balancer, until it is stopped.

    Args:
        url: of the load balancer.
        model: name of the served model.
        seed: of the prompts.
        output_len: tokens of an answer.
        concurrency: streams at a time.
    """

    def __init__(
        self, url: str, *, model: str, seed: int, output_len: str = "8-24", concurrency: int = CONCURRENCY
    ) -> None:
        super().__init__(daemon=True)
        self._target = OneRequestTarget(address=parse_server_address(url), model=model)
        lengths = {"input_len": "4-8", "output_len": output_len}
        distributions = {name: parse_length_distribution(text) for name, text in lengths.items()}
        self._requests, self._concurrency = random_requests(seed=seed, **distributions), concurrency
        self._stops = threading.Event()
        self.num_sent, self.start_s = 0, 0.0
        self.result: LoadResult | None = None

    def _source(self) -> Iterator[LoadRequest]:
        for request in self._requests:
            if self._stops.is_set():
                return
            self.start_s = self.start_s or time.perf_counter()
            self.num_sent += 1
            yield request

    def run(self) -> None:
        """Send requests, so many at a time."""
        self.result = closed_loop(self._target, self._source(), max_concurrency=self._concurrency)

    def wait_for(self, num_requests: int) -> None:
        """Return once so many more requests were sent."""
        wanted, until = self.num_sent + num_requests, time.monotonic() + _WAIT_S
        while self.num_sent < wanted:
            if not self.is_alive() or time.monotonic() > until:
                raise RuntimeError(f"the load stands still after {self.num_sent} requests")
            time.sleep(0.01)

    def finish(self) -> list[RequestOutcome]:
        """Let requests in flight end; return all outcomes."""
        self._stops.set()
        self.join(_WAIT_S)
        if self.result is None:
            raise RuntimeError("the load did not end")
        return self.result.outcomes


@dataclass(kw_only=True)
class Phase:
    """What ended between two events."""

    name: str
    outcomes: list[RequestOutcome] = field(default_factory=list)

    @property
    def good(self) -> list[RequestOutcome]:
        """Requests whose whole answer came."""
        return [each for each in self.outcomes if each.is_good]

    @property
    def cut(self) -> list[RequestOutcome]:
        """Requests that had sent tokens already, and so could not be repeated."""
        return [each for each in self.outcomes if not each.is_good and each.chunks_s]

    @property
    def failed(self) -> list[RequestOutcome]:
        """Requests that failed although their client had got nothing."""
        return [each for each in self.outcomes if not each.is_good and not each.chunks_s]


def rehearse(
    urls: Sequence[str],
    ports: Sequence[int],
    *,
    start: Callable[[int], Replica],
    model: str,
    num_requests: int,
) -> tuple[list[list[Phase]], int | None]:
    """Return the phases of each load balancer, and the exit code of the server that drained.

    Args:
        urls: of the load balancers, each in front of both servers.
        ports: of the two servers.
        start: starts a server on a port, and waits until it is ready.
        model: name of the served model.
        num_requests: that each load balancer gets in each phase.
    """
    first, second = map(start, ports)
    loads = [Stream(url, model=model, seed=seed) for seed, url in enumerate(urls)]
    ends: list[float] = []
    code: int | None = None
    for load in loads:
        load.start()

    def drain() -> None:
        nonlocal code
        code = second.terminate()

    for action in (None, first.kill, lambda: start(ports[0]), drain, lambda: start(ports[1])):
        if action is not None:
            ends.append(time.perf_counter())
            action()
        for load in loads:
            load.wait_for(num_requests)
    return [_phases(load.finish(), [end - load.start_s for end in ends]) for load in loads], code


def _phases(outcomes: Sequence[RequestOutcome], ends: Sequence[float]) -> list[Phase]:
    phases = [Phase(name=name) for name in PHASES]
    for outcome in outcomes:
        phases[sum(outcome.end_s > end for end in ends)].outcomes.append(outcome)
    return phases


def table(kind: str, phases: Sequence[Phase]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {kind} | requests | failed before a token | cut after one | latency p50, p95 | first token p50, p95 |"
    yield "|---|---|---|---|---|---|"
    for phase in phases:
        latencies, firsts = [each.e2el_s for each in phase.good], [each.ttft_s for each in phase.good if each.chunks_s]
        counts = f"{len(phase.outcomes)} | {len(phase.failed)} | {len(phase.cut)}"
        yield f"| {phase.name} | {counts} | {_quantiles(latencies)} | {_quantiles(firsts)} |"


def _quantiles(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "–"
    return f"{statistics.median(values):.2f}, {statistics.quantiles(values, n=20, method='inclusive')[-1]:.2f} s"


def main() -> int:
    """Rehearse, and print a table for each load balancer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400, help="of each phase and load balancer (default: 400)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="load balancer (default: both, side by side)")
    parser.add_argument("overrides", nargs="*", help="of the servers")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that servers end too
    kinds = arguments.kind or list(KINDS)
    words = arguments.overrides or [*SERVER[1:-1], "job.echo_step_s=0.02"]
    print_machine("uvicorn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ports = [free_port(), free_port()]
        upstreams = f"deploy.upstreams=[{','.join(f'127.0.0.1:{port}' for port in ports)}]"
        servers: list[SoakServer] = []

        def start(port: int) -> SoakServer:
            own = Path(folder) / f"server{len(servers)}"
            own.mkdir()
            servers.append(SoakServer(words, replicas=1, folder=own, port=port))
            stack.callback(servers[-1].kill)
            servers[-1].wait_until_ready()
            return servers[-1]

        balancers = [LoadBalancer(kind, Path(folder) / kind, [upstreams]) for kind in kinds]
        for each in balancers:
            stack.callback(each.close)
        model = next((word.partition("=")[2] for word in words if word.startswith("model=")), "model")
        urls = [each.url for each in balancers]
        results, code = rehearse(urls, ports, start=start, model=model, num_requests=arguments.requests)
    num_failed = 0
    for kind, phases in zip(kinds, results, strict=True):
        print("", *table(kind, phases), sep="\n")
        num_failed += sum(len(phase.failed) for phase in phases)
    print(f"\nexit code of the drained server: {code}; failed before a token: {num_failed}")
    return 1 if num_failed or code != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
