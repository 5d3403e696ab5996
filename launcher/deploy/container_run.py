"""The run that a container starts: the served one, with a container's paths and addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.config.deploy.base import ContainerDeploy
from launcher.config.job.serve import Serve
from launcher.config.model.hf import Hf
from launcher.config.run import NoDeploy, Run, default_run_name
from launcher.config.snapshot import dump_run
from launcher.utils.files import sha256_of

SNAPSHOT_FILE = "run.yaml"
SNAPSHOT_FOLDER = "/run/launcher"
"""Where a container finds ``run.yaml``."""
RUNS_FOLDER = "/runs"
"""Where a container writes its run directory."""


def container_run(run: Run, *, names: Sequence[str] = (), has_keys: bool = False, model_path: str | None = None) -> Run:
    """Return the run that a container starts.

    It listens on all interfaces, and keeps its run directory in ``/runs``.

    Args:
        run: the server, with its group deploy.
        names: host names by which clients reach it; a server without API keys accepts only these.
        has_keys: whether the container gets API keys in its environment.
        model_path: folder of the weights in the container; ``None`` keeps what the run names.
    """
    job, model = run.job, run.model
    assert isinstance(job, Serve), "validate_run accepts servers alone"
    has_keys = has_keys or job.api_keys_file is not None
    allowed = job.allowed_hosts if has_keys else (*job.allowed_hosts, *names)
    served = job.served_model_name or default_run_name(job.name_of(run))  # a path says nothing to clients
    job = replace(
        job,
        host="0.0.0.0",  # noqa: S104 (in a container)
        allowed_hosts=tuple(dict.fromkeys(allowed)),
        served_model_name=served if served != model.name else job.served_model_name,
    )
    if model_path is not None:
        is_folder = isinstance(model, Hf) and model.weights == "pretrained"
        model = replace(model, name=model_path) if is_folder else replace(model, weights=model_path)
        job = replace(job, served_model_name=served)
    deploy = run.deploy
    assert isinstance(deploy, ContainerDeploy), "other kinds start no container"
    host, *_ = deploy.hosts(run)  # all are alike
    threads = max(1, deploy.cpus // host.slots) if run.backend.threads == "auto" else run.backend.threads
    # a container sees every core of its node, and may use deploy.cpus of them
    backend = replace(run.backend, ranks=host.slots, threads=threads)
    options = replace(run.run, root=RUNS_FOLDER, dir=None)
    return replace(run, job=job, model=model, backend=backend, run=options, deploy=NoDeploy())


def container_command(deploy: ContainerDeploy) -> list[str]:
    """Return the command of a container whose snapshot lies in ``/run/launcher``."""
    return [deploy.python, "-m", "launcher", "rerun", SNAPSHOT_FOLDER]


def snapshot_with_hash(run: Run) -> tuple[str, str]:
    """Return the text of ``run.yaml`` and its SHA-256."""
    text = dump_run(run)
    return text, sha256_of(text.encode())
