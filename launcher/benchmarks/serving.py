"""The serving benchmark: start a server, put it under each level of load, measure."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher.benchmarks.load_client import HttpConnection, LoadTarget, RequestError
from launcher.benchmarks.load_generator import (
    LoadResult,
    Slo,
    closed_loop,
    open_loop,
    poisson_arrivals,
    random_requests,
    summarize_load,
)
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults, collect_case
from launcher.config.benchmark.serving import (
    LoadRequest,
    ServerAddress,
    parse_length_distribution,
    parse_server_address,
    read_trace,
)
from launcher.errors import JobError
from launcher.protocol.metrics import MetricsWriter
from launcher.utils.schema import to_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.config.benchmark.serving import ServingBenchmark
    from launcher.engines.context import Context


_READY_S, _END_S, _POLL_S = 600.0, 60.0, 0.2

_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
)
"""Variables of this rank's own run, which the server must not inherit."""


@contextlib.contextmanager
def temporary_server(options: Mapping[str, Any], context: Context) -> Iterator[str]:
    """Start a server, yield its address once it is ready, end it.

    Args:
        options: of job=serve.
        context: of this rank; the server has the run's model, precision, attention and strategy.

    Raises:
        JobError: the server does not become ready; the message ends with its log.
    """
    folder, port = context.run_dir.path / "server", _free_port()
    folder.mkdir(exist_ok=True)
    tree = to_tree(context.run)
    tree["job"] = {"kind": "serve", "seed": context.run.job.seed, "port": port, **options}
    tree["benchmark"], tree["tracker"] = {"kind": "none"}, {"kind": "local"}
    if options.get("engine", "paged") != "paged":
        tree["profile"] = {"kind": "false"}  # other engines have nothing to record
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not _is_rank_variable(name)}
    log = folder / "server.log"
    command = [sys.executable, "-m", "launcher", "resume", str(folder)]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log, context)
        yield url
    finally:
        _end(process)


def _is_rank_variable(name: str) -> bool:
    return name in _RANK_VARIABLES or name.startswith(("TORCHELASTIC_", "LAUNCHER_", "GROUP_", "ROLE_", "TORCH_NCCL_"))


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, context: Context) -> None:
    until = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < until:
        context.heartbeat.update("start the server")
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as answer:  # noqa: S310 (this machine)
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(_POLL_S)
    text = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise JobError(f"the server did not become ready; {log} ends with:\n{text}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server by SIGTERM, so that it finishes its requests; kill it after a time limit."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_SEEDS_A_ROUND = 1000
_SHOWN = ("requests", "errors", "tokens_per_s", "ttft_p50_s", "ttft_p99_s", "itl_p99_s", "client_cpu_share")

_QUANTITIES = (
    *("tokens_per_s", "requests_per_s", "goodput_per_s", "ttft_p50_s", "ttft_p99_s"),
    *("tpot_p50_s", "itl_p99_s", "e2el_p50_s", "e2el_p99_s"),
)
"""Figures that the table shows; the JSON holds all."""


def run_serving_benchmark(benchmark: ServingBenchmark, context: Context) -> BenchmarkResults:
    """Measure the server under each level of load in turn."""
    found = measure_levels(benchmark, context)
    cases = [collect_case(name, answers, _QUANTITIES) for name, answers in found.items()]
    return BenchmarkResults(
        benchmark=benchmark,
        cases=cases,
        facts={name: {"rounds": answers} for name, answers in found.items()},
        findings=tuple(_findings(benchmark, found, cases)),
        metrics={f"{case.name}/{name}": case.median(name) for case in cases for name in _QUANTITIES},
    )


def _findings(
    benchmark: ServingBenchmark, found: Mapping[str, Sequence[Mapping[str, Any]]], cases: Sequence[BenchmarkCase]
) -> Iterator[str]:
    for case in cases:
        yield (
            f"{case.name}: {case.median('tokens_per_s'):.1f} tokens/s; TTFT "
            f"{case.median('ttft_p50_s'):.3f} s (p99: {case.median('ttft_p99_s'):.3f} s), "
            f"{case.median('goodput_per_s'):.2f} requests/s goodput"
        )
    for name, answers in found.items():
        bad: Counter[str] = Counter()
        for answer in answers:
            bad.update({key: int(count) for key, count in answer.items() if _is_error(key)})
        if bad:
            yield f"{name}: errors {', '.join(f'{key[6:]} {count}' for key, count in bad.items())}"
    most = max(answer["client_cpu_share"] for answers in found.values() for answer in answers)
    late = max(answer["send_delay_p99_s"] for answers in found.values() for answer in answers)
    yield f"load generator: at most {most:.1%} of a core; requests sent at most {1000 * late:.1f} ms late (99 %)"
    slo = {"TTFT": benchmark.slo_ttft_s, "TPOT": benchmark.slo_tpot_s, "E2EL": benchmark.slo_e2el_s}
    limits = ", ".join(f"{name} at most {value:g} s" for name, value in slo.items() if value is not None)
    yield f"goodput: {limits or 'all complete answers'}"


def _is_error(name: str) -> bool:
    """Return whether a figure counts failed answers.

    Those cancelled at the end of a level did not fail.
    """
    return name.startswith("error/") and name != "error/unfinished"


def measure_levels(benchmark: ServingBenchmark, context: Context) -> dict[str, list[dict[str, Any]]]:
    """Return the figures of each level by name, one dictionary for each round.

    Raises:
        JobError: the server cannot be reached, or cannot be started.
    """
    found: dict[str, list[dict[str, Any]]] = {benchmark.name_of(level): [] for level in benchmark.levels}
    done, total = 0, benchmark.num_measurements
    server = (
        contextlib.nullcontext(benchmark.base_url) if benchmark.base_url else temporary_server(benchmark.serve, context)
    )
    slo = Slo(ttft_s=benchmark.slo_ttft_s, tpot_s=benchmark.slo_tpot_s, e2el_s=benchmark.slo_e2el_s)
    with server as url, MetricsWriter(context.run_dir.metrics) as metrics:
        target = resolve_target(benchmark, url)
        for round_ in range(benchmark.repeats):
            for number, level in enumerate(benchmark.levels):
                seed = context.run.job.seed + _SEEDS_A_ROUND * round_ + number
                progress = partial(_update_heartbeat, context, done, total)
                load = run_level(benchmark, target, level, seed=seed, progress=progress)
                answer = summarize_load(load, slo=slo)
                name = benchmark.name_of(level)
                found[name].append(answer)
                done += 1
                metrics.record(done, **{f"benchmark/{name}/{key}": value for key, value in answer.items()})
                words = ", ".join(f"{key} {answer[key]:,.4g}" for key in _SHOWN)
                print(f"round {round_ + 1}/{benchmark.repeats}  {name}: {words}", flush=True)
    return found


def _update_heartbeat(context: Context, done: int, total: int, requests: int) -> None:
    context.heartbeat.update("measure", done, steps=total, requests=requests)


def run_level(
    benchmark: ServingBenchmark, target: LoadTarget, level: float, *, seed: int, progress: Callable[[int], None]
) -> LoadResult:
    """Put a server under one level of load."""
    requests = level_requests(benchmark, seed=seed)
    if not benchmark.is_open_loop:
        return closed_loop(
            target, requests, max_concurrency=int(level), seconds=benchmark.duration_s, progress=progress
        )
    times = poisson_arrivals(seed=seed + 1, request_rate=level)
    due = (LoadRequest(request.fields, at_s) for request, at_s in zip(requests, times, strict=False))
    return open_loop(target, due, seconds=benchmark.duration_s, progress=progress)


def level_requests(benchmark: ServingBenchmark, *, seed: int) -> Iterator[LoadRequest]:
    """Return the endless requests of one level."""
    if benchmark.trace is not None:
        return itertools.cycle(read_trace(Path(benchmark.trace).expanduser()))
    return random_requests(
        seed=seed,
        input_len=parse_length_distribution(benchmark.input_len),
        output_len=parse_length_distribution(benchmark.output_len),
    )


def resolve_target(benchmark: ServingBenchmark, url: str) -> LoadTarget:
    """Return the server that requests go to.

    Raises:
        JobError: the server does not respond or names no model.
    """
    address, key = parse_server_address(url), os.environ.get(benchmark.api_key_variable, "")
    model = benchmark.served_model_name or first_model(address, key=key)
    return LoadTarget(address=address, model=model, extra_body=benchmark.extra_body, key=key)


def first_model(address: ServerAddress, *, key: str) -> str:
    """Return the first model that a server names."""

    async def ask() -> bytes:
        connection = HttpConnection(address, headers={"Authorization": f"Bearer {key}"} if key else {})
        try:
            answer = await connection.get("/v1/models")
            body = await answer.body()
        finally:
            connection.close()
        if answer.status != 200:
            raise RequestError(str(answer.status), body[:200].decode(errors="replace"))
        return body

    try:
        return str(json.loads(asyncio.run(ask()))["data"][0]["id"])
    except (RequestError, ValueError, KeyError, IndexError, TypeError) as error:
        raise JobError(f"{address.base} names no model: {error}; set benchmark.served_model_name") from error
