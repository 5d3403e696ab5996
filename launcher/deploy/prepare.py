"""From overrides, or a saved run, to the run and the plan that are rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.config.compose import Composition, compose
from launcher.config.deploy.base import ContainerDeploy
from launcher.config.deploy.kubernetes import KubernetesDeploy
from launcher.config.run import NoDeploy, Run, run_to_tree
from launcher.config.validate import validate_overrides_used, validate_secrets
from launcher.errors import ConfigErrors
from launcher.execution.prepare import DEFAULT_PORT, replan, validate_paths
from launcher.execution.run_references import resolve_run_references
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir
from launcher.runs.config_source import load_saved_run
from launcher.utils.files import read_regular

_READY = re.compile(rb"^serving .* after ([0-9]+\.[0-9]+) s;", re.MULTILINE)
"""The line that a server prints once it is ready."""
_RUN_ID = "deploy"
"""Of the plan: what a pod starts gets an id of its own."""


def prepare(words: Sequence[str], *, config_dir: Path | None = None) -> tuple[Run, Plan]:
    """Return the composed server and its plan in one container.

    Args:
        words: overrides, ``deploy=…`` among them.
        config_dir: a folder of the user's own options.

    Raises:
        ConfigErrors: everything that prevents it.
    """
    composed = compose(words, config_dir=config_dir)
    return plan_deployment(composed)


def prepare_saved(folder: Path, words: Sequence[str]) -> tuple[Run, Plan]:
    """Return a saved run with the deployment that ``words`` choose, and its plan.

    Args:
        folder: of the saved run.
        words: overrides; those of the group deploy choose it, the others change values of the run.

    Raises:
        ConfigErrors: everything that prevents it.
    """
    chosen = [word for word in words if word.lstrip("+").partition("=")[0].partition(".")[0] == "deploy"]
    run = load_saved_run(folder, [word for word in words if word not in chosen])
    deploy = compose(chosen).run.deploy
    measured = _measured_load_s(RunDir(folder))
    if isinstance(deploy, KubernetesDeploy) and measured is not None and not _sets(chosen, "deploy.load_s"):
        deploy = replace(deploy, load_s=measured)
    run = replace(run, run=replace(run.run, dir=None), deploy=deploy)
    return plan_deployment(Composition(run=run, tree=run_to_tree(run), sweep=None, overrides=tuple(words)))


def _sets(words: Sequence[str], option: str) -> bool:
    return any(word.lstrip("+").partition("=")[0] == option for word in words)


def _measured_load_s(run_dir: RunDir) -> float | None:
    """Return the seconds until a saved server was ready; ``None`` if its log does not say."""
    for path in sorted(run_dir.logs.glob("*.log")):
        try:
            found = _READY.findall(read_regular(path, inside=run_dir.path))
        except OSError:
            continue
        if found:
            return float(found[-1])
    return None


def plan_deployment(composed: Composition) -> tuple[Run, Plan]:
    """Return a composed server, names of runs in it replaced by folders, and its plan.

    Raises:
        ConfigErrors: everything that prevents it.
    """
    if unreachable := list(validate_paths(composed.run)):
        raise ConfigErrors(unreachable)
    run = resolve_run_references(composed)
    hosts = run.deploy.hosts(run)
    if isinstance(run.deploy, ContainerDeploy) and (errors := list(run.deploy.validate_hosts(hosts))):
        raise ConfigErrors(errors)
    errors = list(validate_overrides_used(run, [word for word in composed.overrides if "=" in word]))
    folder = Path(run.run.root).absolute() / run.run.name / _RUN_ID
    try:
        planned = replan(replace(run, deploy=NoDeploy()), hosts, run_id=_RUN_ID, folder=folder, port=DEFAULT_PORT)
    except ConfigErrors as several:
        raise ConfigErrors([*errors, *several.errors]) from several
    errors += (error for error in validate_secrets(run) if error.option.startswith("deploy."))
    errors += run.deploy.validate_run(run, planned.plan)
    if errors:
        raise ConfigErrors(errors)
    return run, planned.plan
