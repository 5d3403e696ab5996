"""The job benchmark on a rank: measure, record the metrics and write the results."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.benchmarks.registry import execute_benchmark
from launcher.config.run import Benchmark
from launcher.protocol.metrics import MetricsWriter

if TYPE_CHECKING:
    from launcher.config.job.benchmark import BenchmarkJob
    from launcher.engines.context import Context


def run_benchmark(job: BenchmarkJob, context: Context) -> None:
    """Measure on this rank; rank 0 writes what was found."""
    benchmark = context.run.benchmark
    assert isinstance(benchmark, Benchmark), "refused before anything starts"
    results = execute_benchmark(replace(context, run=job.measured_run(context.run)))
    if results is not None and context.is_main:
        done = benchmark.num_measurements
        with MetricsWriter(context.run_dir.metrics, start_step=done) as metrics:
            metrics.record(done, **{f"benchmark/{name}": value for name, value in results.metrics.items()})
        results.publish(context.run_dir)
        if context.run.profile.kind == "true" and not any(context.run_dir.path.glob("**/profile/*.trace.json.gz")):
            print(f"profile: benchmark={benchmark.kind} has nothing that could be recorded", flush=True)
    context.heartbeat.update("done", benchmark.num_measurements)
