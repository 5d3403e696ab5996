"""The batch script of a run, or of a job array: every option of sbatch, as text."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.backends.slurm.setup import setup_in_batch_script
from launcher.backends.slurm.steps import describe_steps
from launcher.config.backend.slurm import SlurmBackend
from launcher.plugins.loading import path_environment
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir

ARRAY_FLAG = "--array"
"""Argument of the entry point, before the folder of a sweep.
Slurm's variable of the task says which of its runs to execute."""
_PLAIN = re.compile(r"[\w./:,=+@%^~\[\]-]*", re.ASCII)


def render_sbatch(backend: SlurmBackend, plan: Plan, *, plugins: Sequence[str] = ()) -> str:
    """Return the batch script: options of sbatch, setup, then ``exec`` of the session.

    The session replaces the shell, so it receives the signals that Slurm sends to the batch process.

    Args:
        backend: the options of sbatch.
        plan: what to run.
        plugins: modules of the plugins that the run uses.
    """
    output = str(slurm_log_path(plan, "%j"))
    directives = [_set("job-name", plan.name), *_directives(backend, plan, output)]
    comment = backend.describe_memory(plan.hosts[0].host, plan.memory)
    return _script(backend, directives, (plan.run_dir,), plugins, comment=comment)


def render_array(
    backend: SlurmBackend, plan: Plan, *, folder: Path, tasks: Sequence[int], plugins: Sequence[str] = ()
) -> str:
    """Return the batch script of a job array whose tasks are the runs of a sweep.

    Args:
        backend: the options of sbatch, the same for all runs.
        plan: of one of the runs.
        folder: the directory of the sweep.
        tasks: the numbers of the runs.
        plugins: modules of the plugins that the runs use.
    """
    escaped = Path(str(folder).replace("%", "%%"))
    output = str(RunDir(escaped / "%3a").logs / "slurm.%A_%a.log")  # %3a: the number as trial_folder writes it
    limit = f"%{backend.max_parallel}" if backend.max_parallel is not None else ""
    array = f"array={','.join(_ranges(tasks))}{limit}"
    directives = [_set("job-name", folder.parent.name), array, *_directives(backend, plan, output)]
    return _script(backend, directives, (ARRAY_FLAG, str(folder)), plugins)


def _script(
    backend: SlurmBackend,
    directives: Sequence[str],
    arguments: Sequence[str],
    plugins: Sequence[str],
    *,
    comment: str = "",
) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in path_environment(plugins).items()]
    command = shlex.join([sys.executable, "-P", "-m", "launcher.backends.slurm.entrypoint", *arguments])
    setup = setup_in_batch_script(backend.setup, on_failure=command)
    shell = "#!/bin/bash" if backend.setup else "#!/bin/sh"
    options = [f"#SBATCH --{line}" for line in directives]
    options += [f"# {line}" for line in (comment, describe_steps(backend)) if line]
    return "\n".join([shell, *options, "", *exports, *setup, f"exec {command}", ""])


def _directives(backend: SlurmBackend, plan: Plan, output: str) -> Iterator[str]:
    yield _set("nodes", backend.nodes)
    yield "ntasks-per-node=1"  # that node's agent
    for option in ("cpus_per_task", "gpus_per_node"):
        yield from _set_if_given(backend, option)
    if backend.mem is not None:
        yield _set("mem", backend.memory_text(plan.hosts[0].host))
    yield from _set_if_given(backend, "time")
    if backend.exclusive:
        yield "exclusive"
    for option in ("partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude"):
        yield from _set_if_given(backend, option)
    yield "requeue" if backend.requeue else "no-requeue"
    yield f"signal=B:USR1@{backend.signal_lead_s}"
    yield "open-mode=append"  # a requeued job appends to the same file
    yield _set("output", output)
    yield _set("export", ",".join(plan.forwarded_env) or "NONE")
    for word in backend.sbatch_options:
        name, _, value = word.removeprefix("--").partition("=")
        yield _set(name, value) if value else name


def slurm_log_path(plan: Plan, job_id: str) -> Path:
    """Return the file of the session's output; Slurm replaces ``%j`` by the job id."""
    folder = RunDir(Path(plan.run_dir.replace("%", "%%") if job_id == "%j" else plan.run_dir)).logs
    return folder / f"slurm.{job_id}.log"


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Yield numbers, which rise, as sbatch takes them: ``0-3``, ``7``."""
    left = list(numbers)
    while left:
        count = next((at for at, number in enumerate(left) if number != left[0] + at), len(left))
        yield str(left[0]) if count == 1 else f"{left[0]}-{left[count - 1]}"
        left = left[count:]


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
