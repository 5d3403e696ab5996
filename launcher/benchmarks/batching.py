"""The batching benchmark: a queue of requests answered by an engine in this process."""

from __future__ import annotations

import hashlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.harness import case_profiler
from launcher.benchmarks.load_generator import percentile
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults, collect_case
from launcher.config.benchmark.inference import EXAMPLE_TEXTS
from launcher.config.benchmark.serving import parse_length_distribution
from launcher.config.profile import TorchProfile
from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.paged_engine import make_paged_engine
from launcher.inference.tokenizer import open_tokenizer
from launcher.protocol.metrics import MetricsWriter

if TYPE_CHECKING:
    from launcher.config.benchmark.inference import BatchingBenchmark
    from launcher.config.inference import BatchingMode
    from launcher.engines.context import Context
    from launcher.inference.engine.base import InferenceEngine


def run_batching_benchmark(benchmark: BatchingBenchmark, context: Context) -> BenchmarkResults:
    """Measure each batching mode with the same queue."""
    found = measure_batching(benchmark, context)
    quantities = ("elapsed_s", "requests_per_s", "per_request_s", "e2el_p50_s", "e2el_p99_s", "padding_share")
    cases = [collect_case(mode, found[mode], quantities) for mode in benchmark.modes]
    digests = {sample["answers"] for samples in found.values() for sample in samples}
    return BenchmarkResults(
        benchmark=benchmark,
        cases=cases,
        facts={mode: found[mode][-1] for mode in benchmark.modes},
        findings=tuple(_findings(benchmark, cases, len(digests), context)),
        metrics=_metrics(cases),
    )


def _findings(
    benchmark: BatchingBenchmark, cases: Sequence[BenchmarkCase], num_answers: int, context: Context
) -> Iterator[str]:
    """Yield the lines that the article prints for each batching mode."""
    for case in cases:
        yield (
            f"{case.name}: {benchmark.num_prompts} requests in {case.median('elapsed_s'):.2f} s, "
            f"{case.median('requests_per_s'):.2f} requests/s, "
            f"mean {1000 * case.median('per_request_s'):.1f} ms a request, padding {case.median('padding_share'):.1%}"
        )
    yield from (f"{name}: {value:.2f} times none" for name, value in _metrics(cases).items())
    same = "the same in every mode" if num_answers == 1 else f"{num_answers} different sets of them"
    yield f"answers: {same} (precision={context.run.precision.kind})"
    if context.run.model.weights == "random":
        yield "weights: random, so the answers mean nothing; their speed is that of trained ones"


def _metrics(cases: Sequence[BenchmarkCase]) -> dict[str, float]:
    """Return the throughput of each batching mode relative to ``none``."""
    speeds = {case.name: case.median("requests_per_s") for case in cases}
    if "none" not in speeds:
        return {}
    return {f"{name}/speedup": speed / speeds["none"] for name, speed in speeds.items() if name != "none"}


def measure_batching(benchmark: BatchingBenchmark, context: Context) -> dict[str, list[dict[str, Any]]]:
    """Answer the same queue under each batching mode in turn (A B A B); return samples by mode.

    A warm-up queue, not counted, precedes the first round.

    The first round is preceded by a queue that does not count: whatever is slow the first time is over then.
    """
    run = context.run
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in benchmark.modes}
    done, total = 0, benchmark.num_measurements
    requests = list(make_queue(benchmark, context))
    with MetricsWriter(context.run_dir.metrics) as metrics:
        for round_ in range(benchmark.repeats):
            for mode in benchmark.modes:
                update = partial(context.heartbeat.update, step=done, steps=total)
                build = partial(update, "build")
                engine = make_paged_engine(run, limits=benchmark.limits(mode), rank=0, world_size=1, heartbeat=build)
                try:
                    for _ in range(benchmark.warmup if round_ == 0 else 0):
                        answer_queue(engine, requests[: benchmark.max_batch_size], heartbeat=partial(update, "warm up"))
                    sample = answer_queue(engine, requests, heartbeat=partial(update, "measure"))
                finally:
                    engine.close()
                found[mode].append(sample)
                done += 1
                numbers = {name: value for name, value in sample.items() if isinstance(value, int | float)}
                metrics.record(done, **{f"benchmark/{mode}/{name}": value for name, value in numbers.items()})
                figures = ", ".join(f"{name} {value:,.4g}" for name, value in numbers.items())
                print(f"round {round_ + 1}/{benchmark.repeats}  {mode}: {figures}", flush=True)
    if isinstance(run.profile, TorchProfile):
        for mode in benchmark.modes:
            _profile(benchmark, mode, requests, context)
    return found


def _profile(benchmark: BatchingBenchmark, mode: BatchingMode, requests: list[EngineRequest], context: Context) -> None:
    """Answer the queue once more under one batching mode, with the profiler."""
    heartbeat = partial(context.heartbeat.update, "profile")
    engine = make_paged_engine(context.run, limits=benchmark.limits(mode), rank=0, world_size=1, heartbeat=heartbeat)
    try:
        with case_profiler(mode, context) as profiler:
            engine.profiler = profiler
            answer_queue(engine, requests, heartbeat=heartbeat)
    finally:
        engine.close()


def make_queue(benchmark: BatchingBenchmark, context: Context) -> Iterator[EngineRequest]:
    """Yield the requests, always the same for the same seed."""
    random_ = random.Random(context.run.job.seed)
    outputs = parse_length_distribution(benchmark.output_len)
    prompts = itertools.islice(_prompts(benchmark, context, random_), benchmark.num_prompts)
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=outputs.draw(random_), ignore_eos=True)
        yield EngineRequest(id=str(number), prompt=prompt, sampling=sampling)


def _prompts(benchmark: BatchingBenchmark, context: Context, random_: random.Random) -> Iterator[tuple[int, ...]]:
    if benchmark.input_len == "article":
        tokenizer = open_tokenizer(benchmark.tokenizer, context.run, heartbeat=lambda: context.heartbeat.update("load"))
        yield from itertools.cycle([tuple(tokenizer.encode(text)) for text in EXAMPLE_TEXTS])
    shape = context.run.model.shape()
    vocabulary = shape.vocab_size if shape is not None else 256
    lengths = parse_length_distribution(benchmark.input_len)
    while True:
        yield tuple(random_.choices(range(vocabulary), k=lengths.draw(random_)))


def answer_queue(
    engine: InferenceEngine, requests: list[EngineRequest], *, heartbeat: Callable[[], None]
) -> dict[str, Any]:
    """Submit all requests to an engine at once; return the time and tokens of the queue.

    ``per_request_s`` is the time of all divided by their number, as the article has it; ``e2el`` is the end-to-end
    latency of one of them, from being added to its last token. ``padding_share`` is that of all computed positions.
    """
    before = engine.stats()
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    ended: dict[str, float] = {}
    while len(ended) < len(requests):
        for output in engine.step():
            tokens[output.request_id] += [token.id for token in output.tokens]
            if output.finish_reason is not None:
                assert output.finish_reason == "length", (
                    f"{output.request_id} ended as {output.finish_reason}: {output.error}"
                )
                ended[output.request_id] = time.perf_counter() - started
        heartbeat()
    elapsed_s, after = time.perf_counter() - started, engine.stats()
    padding = after.padding_tokens_total - before.padding_tokens_total
    useful = after.prompt_tokens_total - before.prompt_tokens_total
    useful += after.generated_tokens_total - before.generated_tokens_total
    return {
        "elapsed_s": elapsed_s,
        "requests_per_s": len(requests) / elapsed_s,
        "per_request_s": elapsed_s / len(requests),
        "e2el_mean_s": statistics.fmean(ended.values()),
        "e2el_p50_s": percentile(list(ended.values()), 50),
        "e2el_p99_s": percentile(list(ended.values()), 99),
        "padding_share": padding / (padding + useful),
        "tokens": sum(map(len, tokens.values())),
        "answers": hashlib.sha256(repr([tokens[request.id] for request in requests]).encode()).hexdigest(),
    }
