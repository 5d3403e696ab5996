"""The run that a container starts: the served one, with a container's paths and addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.config.deploy.base import ContainerDeploy
from launcher.config.job.serve import Serve
from launcher.config.run import NoDeploy, Run
from launcher.config.snapshot import dump_run
from launcher.utils.files import sha256_of

SNAPSHOT_FOLDER = "/run/launcher"
"""Where a container finds ``run.yaml``."""
RUNS_FOLDER = "/runs"
"""Where a container writes its run directory."""


def container_run(run: Run, *, names: Sequence[str] = ()) -> Run:
    """Return the run that a container starts.

    It listens on all interfaces, and keeps its run directory in ``/runs``.

    Args:
        run: the server, with its group deploy.
        names: host names by which clients reach it; a server without API keys accepts only these.
    """
    job = run.job
    assert isinstance(job, Serve), "validate_run accepts servers alone"
    allowed = job.allowed_hosts if job.api_keys_file is not None else (*job.allowed_hosts, *names)
    job = replace(job, host="0.0.0.0", allowed_hosts=tuple(dict.fromkeys(allowed)))  # noqa: S104 (in a container)
    options = replace(run.run, root=RUNS_FOLDER, dir=None)
    return replace(run, job=job, run=options, deploy=NoDeploy())


def container_command(deploy: ContainerDeploy) -> list[str]:
    """Return the command of a container whose snapshot lies in ``/run/launcher``."""
    return [deploy.python, "-m", "launcher", "rerun", SNAPSHOT_FOLDER]


def snapshot_with_hash(run: Run) -> tuple[str, str]:
    """Return the text of ``run.yaml`` and its SHA-256."""
    text = dump_run(run)
    return text, sha256_of(text.encode())
