"""The batch script of a run: every option of sbatch, as text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.config.backend.slurm import SlurmBackend
from launcher.plugins.loading import path_environment
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir

_PLAIN = re.compile(r"[\w./:,=+@%^~\[\]-]*", re.ASCII)


def render_sbatch(backend: SlurmBackend, plan: Plan, *, plugins: Sequence[str] = ()) -> str:
    """Return the batch script: options of sbatch, then ``exec`` of the session.

    The session replaces the shell, so it receives the signals that Slurm sends to the batch process.

    Args:
        backend: the options of sbatch.
        plan: what to run.
        plugins: modules of the plugins that the run uses.
    """
    directives = [f"#SBATCH --{line}" for line in _directives(backend, plan)]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in path_environment(plugins).items()]
    command = shlex.join([plan.hosts[0].host.python, "-P", "-m", "launcher.backends.slurm.entrypoint", plan.run_dir])
    return "\n".join(["#!/bin/sh", *directives, "", *exports, f"exec {command}", ""])


def _directives(backend: SlurmBackend, plan: Plan) -> Iterator[str]:
    yield _set("job-name", plan.name)
    yield _set("nodes", backend.nodes)
    yield "ntasks-per-node=1"  # that node's agent
    for option in ("cpus_per_task", "gpus_per_node", "mem", "time"):
        yield from _set_if_given(backend, option)
    for option in ("partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude"):
        yield from _set_if_given(backend, option)
    yield "requeue" if backend.requeue else "no-requeue"
    yield f"signal=B:USR1@{backend.signal_lead_s}"
    yield "open-mode=append"  # a requeued job appends to the same file
    yield _set("output", str(slurm_log_path(plan, "%j")))
    yield _set("export", ",".join(plan.forwarded_env) or "NONE")
    for word in backend.sbatch_options:
        name, _, value = word.removeprefix("--").partition("=")
        yield _set(name, value) if value else name


def slurm_log_path(plan: Plan, job_id: str) -> Path:
    """Return the file of the session's output; Slurm replaces ``%j`` by the job id."""
    folder = RunDir(Path(plan.run_dir.replace("%", "%%") if job_id == "%j" else plan.run_dir)).logs
    return folder / f"slurm.{job_id}.log"


def _set_if_given(backend: SlurmBackend, option: str) -> Iterator[str]:
    value = getattr(backend, option)
    if value is not None:
        yield _set(option.replace("_", "-"), value)


def _set(name: str, value: object) -> str:
    """Return one option, quoted: sbatch parses quotes, backslashes and # like a shell."""
    text = str(value)
    if _PLAIN.fullmatch(text):
        return f"{name}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'
