"""The registry of executors: one line for each kind of backend."""

from __future__ import annotations

from launcher.config.backend.base import Backend
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


def executor_of(backend: Backend) -> AnyExecutor:
    """Return the executor of ``backend``, which is imported now, with its options."""
    found: AnyExecutor = executor("backend", backend.kind, EXECUTORS)(backend)
    return found
