"""The registry of benchmarks: which function executes each kind of benchmark on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launcher.config.run import Benchmark
from launcher.plugins.loading import executor

if TYPE_CHECKING:
    from launcher.benchmarks.results import BenchmarkResults
    from launcher.engines.context import Context

EXECUTORS: dict[str, str] = {
    "activation": "launcher.benchmarks.activation:run_activation_benchmark",
    "attention": "launcher.benchmarks.attention:run_attention_benchmark",
    "batching": "launcher.benchmarks.batching:run_batching_benchmark",
    "cache": "launcher.benchmarks.cache:run_cache_benchmark",
    "checkpoint": "launcher.benchmarks.checkpoint:run_checkpoint_benchmark",
    "collectives": "launcher.benchmarks.collectives:run_collectives_benchmark",
    "data": "launcher.benchmarks.data:run_data_benchmark",
    "lm_eval": "launcher.benchmarks.lm_eval.tasks:run_lm_eval_benchmark",
    "memory": "launcher.benchmarks.memory:run_memory_benchmark",
    "pipeline": "launcher.benchmarks.pipeline:run_pipeline_benchmark",
    "quantization": "launcher.benchmarks.quantization:run_quantization_benchmark",
    "serving": "launcher.benchmarks.serving:run_serving_benchmark",
}
"""Function of each benchmark kind: takes the benchmark's options and the rank's context."""


def execute_benchmark(context: Context) -> BenchmarkResults | None:
    """Execute the benchmark of ``context.run``; return its results, on rank 0 at least."""
    benchmark = context.run.benchmark
    assert isinstance(benchmark, Benchmark), "refused before anything starts"
    function: Callable[[Any, Context], BenchmarkResults | None] = executor("benchmark", benchmark.kind, EXECUTORS)
    return function(benchmark, context)
