"""The registry of jobs: which function executes each kind of job on a rank."""

from __future__ import annotations

from launcher.engines.context import Context
from launcher.plugins.loading import executor

EXECUTORS: dict[str, str] = {
    "train": "launcher.training.trainer:train",
    "evaluate": "launcher.training.evaluate:run_evaluation",
    "generate": "launcher.inference.batch.generate:generate",
    "serve": "launcher.inference.server.api_server:serve",
    "quantize": "launcher.benchmarks.quantize:quantize_model",
    "sparsify": "launcher.benchmarks.sparsify:sparsify_model",
    "benchmark": "launcher.jobs.benchmark:run_benchmark",
    "verify": "launcher.verification.verify:verify",
}
"""Function of each kind of job; it takes the job's options and the context of the rank."""


def execute_job(context: Context) -> None:
    """Execute the job of ``context.run`` on this rank."""
    job = context.run.job
    if job.handles_preemption:
        context.preemption.install()  # before the import below, because importing torch takes seconds
    executor("job", job.kind, EXECUTORS)(job, context)
