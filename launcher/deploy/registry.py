"""The registry of renderers: one line for each kind of deployment."""

from __future__ import annotations

import importlib

from launcher.config.run import Run
from launcher.config.snapshot import dump_run
from launcher.deploy.container_run import SNAPSHOT_FILE
from launcher.protocol.plan import Plan

RENDERERS: dict[str, str] = {
    "kubernetes": "launcher.deploy.kubernetes.render",
    "compose": "launcher.deploy.compose",
    "docker": "launcher.deploy.docker",
    "helm": "launcher.deploy.helm",
    "nginx": "launcher.deploy.nginx",
    "haproxy": "launcher.deploy.haproxy",
    "monitoring": "launcher.deploy.monitoring.render",
}
"""Module of each ``Deploy.kind``.
It has ``render(run, plan)``, a pure function from run and plan to the content of each file."""


def render(run: Run, plan: Plan) -> dict[str, str | bytes]:
    """Return the content of each file by its path in ``deploy.out``.

    A text is written as UTF-8.

    ``run.yaml`` is the run with its group deploy, from which the folder can be rendered again.

    Args:
        run: the server, with its group deploy.
        plan: of the server in one container.
    """
    module = importlib.import_module(RENDERERS[run.deploy.kind])
    files: dict[str, str | bytes] = module.render(run, plan)
    return {SNAPSHOT_FILE: dump_run(run), **files}
