"""The quantization benchmark: greedy decoding with weights in several formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.harness import sample_interleaved
from launcher.benchmarks.isolated import pack_component, run_isolated
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults, collect_case
from launcher.config.benchmark.inference import FORMATS

if TYPE_CHECKING:
    from launcher.config.benchmark.inference import QuantizationBenchmark
    from launcher.engines.context import Context

_DECODE, _BANDWIDTH = "launcher.benchmarks.decoding:decode", "launcher.benchmarks.decoding:read_bandwidth"


def run_quantization_benchmark(benchmark: QuantizationBenchmark, context: Context) -> BenchmarkResults:
    """Measure all cases in turn, each time in a process of its own."""
    bandwidth = run_isolated(_BANDWIDTH, {}, heartbeat=lambda: context.heartbeat.update("bandwidth"))["bytes_per_s"]
    asked = {name: _arguments(benchmark, context, name) for name in benchmark.names}
    samples = sample_interleaved(_DECODE, asked, repeats=benchmark.repeats, context=context)
    quantities = ("token_s", "prefill_per_s", "first_s", "read_bytes")
    cases = [collect_case(name, samples[name], quantities) for name in benchmark.names]
    return BenchmarkResults(
        benchmark=benchmark,
        cases=cases,
        facts={name: _facts(samples[name], bandwidth) for name in benchmark.names},
        findings=tuple(_findings(benchmark, cases, samples, bandwidth)),
        metrics={**_metrics(cases, bandwidth), "read_bandwidth_bytes_per_s": bandwidth},
    )


def _arguments(benchmark: QuantizationBenchmark, context: Context, name: str) -> dict[str, Any]:

    weights, _, how = name.partition("/")
    run = context.run
    return {
        "model": pack_component(run.model),
        "weights": weights,
        "how": how,
        "rest": weights if weights in FORMATS else run.precision.compute,
        "seed": run.job.seed,
        "batch_size": benchmark.batch_size,
        "input_len": benchmark.input_len,
        "output_len": benchmark.output_len,
        "warmup": benchmark.warmup,
        "rank": context.local_rank,
        "peer": [benchmark.ctranslate2_python, benchmark.ctranslate2],
    }


def _findings(
    benchmark: QuantizationBenchmark,
    cases: Sequence[BenchmarkCase],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    bandwidth: float,
) -> Iterator[str]:
    first = cases[0]
    yield f"memory is read at {bandwidth / 1e9:.1f} GB/s"
    for case in cases:
        seconds = case.median("token_s")
        share = case.median("read_bytes") / seconds / bandwidth
        yield (
            f"{case.name}: {benchmark.batch_size / seconds:.1f} tokens/s, "
            f"{first.median('token_s') / seconds:.2f} times "
            f"{first.name}; {share:.0%} of what reading {case.median('read_bytes') / 1e6:.0f} MB a token allows"
        )
    for case in cases:
        if case.name.endswith(("/compiled", "/blocks")):
            started = case.samples["first_s"]
            yield f"{case.name}: compiled in {started[0]:.1f} s, from the cache in {min(started):.1f} s"
    best = min(cases, key=lambda case: case.median("token_s"))
    yield f"best: {best.name}, {first.median('token_s') / best.median('token_s'):.2f} times {first.name}"
    for case in cases[1:]:
        if case.median("token_s") > first.median("token_s"):
            yield f"{case.name} is slower than {first.name} on this machine"
    for name, taken in samples.items():
        if len({sample["digest"] for sample in taken}) > 1:
            yield f"{name}: NOT the same tokens in every process"


def _facts(samples: Sequence[Mapping[str, Any]], bandwidth: float) -> dict[str, Any]:
    return {"tokens": sorted({sample["digest"] for sample in samples}), "read_bandwidth_bytes_per_s": bandwidth}


def _metrics(cases: Sequence[BenchmarkCase], bandwidth: float) -> dict[str, float]:
    found = {}
    for case in cases:
        seconds = case.median("token_s")
        found[f"{case.name}/speedup"] = cases[0].median("token_s") / seconds
        found[f"{case.name}/roofline_share"] = case.median("read_bytes") / seconds / bandwidth
    return found
