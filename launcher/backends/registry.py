"""The registry of executors: one line for each kind of backend."""

from __future__ import annotations

from launcher.config.run import Run
from launcher.execution.executor import AnyExecutor
from launcher.plugins.loading import executor

EXECUTORS: dict[str, str] = {
    "deepspeed": "launcher.backends.deepspeed:DeepspeedExecutor",
    "kubernetes": "launcher.backends.kubernetes.submit:KubernetesExecutor",
    "local": "launcher.backends.local:LocalExecutor",
    "slurm": "launcher.backends.slurm.submit:SlurmExecutor",
    "ssh": "launcher.backends.ssh:SshExecutor",
}
"""Executor of each ``Backend.kind``.
A new backend needs its options, its executor, its YAML and a line here."""


def executor_of(run: Run) -> AnyExecutor:
    """Return the executor of a run's backend, which is imported now."""
    found: AnyExecutor = executor("backend", run.backend.kind, EXECUTORS)(run.backend, plugins=run.plugins)
    return found
