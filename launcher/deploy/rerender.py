"""A folder that is rendered again: it stays one deployment, and a canary keeps its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.config.deploy.base import RenderedDeploy
from launcher.config.deploy.canary import CanaryDeploy
from launcher.config.deploy.kubernetes import KubernetesDeploy
from launcher.config.deploy.proxy import ProxyDeploy
from launcher.config.run import Run
from launcher.config.snapshot import load_run
from launcher.deploy.container_run import SNAPSHOT_FILE
from launcher.deploy.folder import changed_files, load_list
from launcher.errors import ConfigError


def over_rendered(run: Run, folder: Path, words: Sequence[str]) -> tuple[Run, bool]:
    """Return the run to render into ``folder``, and whether a promotion set its weights.

    Args:
        run: that was composed.
        folder: ``deploy.out``, which may hold an earlier rendering.
        words: overrides that the user typed.

    Raises:
        ConfigError: the folder holds another deployment, or a promotion set other weights than the options.
    """
    before = _rendered(folder)
    if before is None:
        return run, False
    now, then = dict(_identity(run)), dict(_identity(before))
    if other := {option: value for option, value in then.items() if now.get(option) != value}:
        ours = {option: now[option] for option in other if option in now}
        why = f"holds {_shown(other)}, and would get {_shown(ours) or f'deploy={run.deploy.kind}'} instead"
        fix = "set deploy.out to another folder"
        if isinstance(before.deploy, KubernetesDeploy):
            fix += f", or launch deploy delete {folder}, then remove the folder"
        else:
            fix += ", or remove this one"
        raise ConfigError("deploy.out", folder, why=why, fix=fix)
    return _with_weights(run, before, folder, words)


def _rendered(folder: Path) -> Run | None:
    """Return what was rendered into a folder; ``None`` if nothing, or ``write`` refuses it."""
    if SNAPSHOT_FILE not in load_list(folder).files:
        return None
    try:
        if changed_files(folder, [SNAPSHOT_FILE]):
            return None
    except OSError:
        return None
    try:
        return load_run(folder / SNAPSHOT_FILE)
    except ConfigError as error:
        why = f"its {SNAPSHOT_FILE} cannot be read: {error.why}"
        fix = "set deploy.out to another folder, or remove this one"
        raise ConfigError("deploy.out", folder, why=why, fix=fix) from error


def _identity(run: Run) -> Iterator[tuple[str, str]]:
    """Yield options without whose values the earlier files or objects are not found again."""
    deploy = run.deploy
    yield "deploy", deploy.kind
    if isinstance(deploy, RenderedDeploy) and not isinstance(deploy, ProxyDeploy):
        yield "deploy.name", deploy.object_name(run)
    if isinstance(deploy, KubernetesDeploy):
        yield "deploy.version", deploy.version
        yield "deploy.namespace", deploy.namespace


def _shown(options: dict[str, str]) -> str:
    return " ".join(f"{option}={value}" for option, value in options.items())


def _with_weights(run: Run, before: Run, folder: Path, words: Sequence[str]) -> tuple[Run, bool]:
    """Return the run with the weights of the earlier rendering, unless the options set others."""
    deploy, old = run.deploy, before.deploy
    if not (isinstance(deploy, CanaryDeploy) and isinstance(old, CanaryDeploy) and deploy.has_canary):
        return run, False
    if not old.has_canary or _canary(deploy) != _canary(old):
        return run, False
    is_promoted = load_list(folder).is_promoted
    if deploy.canary_share == old.canary_share:
        return run, is_promoted
    option = deploy.share_option
    if not _is_set(deploy, option, words):
        return replace(run, deploy=deploy.with_canary_share(old.canary_share)), is_promoted
    if is_promoted:
        name = deploy.version_names[1]
        why = f"gives {name} {deploy.canary_share} % of the requests, and launch deploy promote or rollback set "
        why += f"{old.canary_share} % in {folder}"
        fix = f"leave it out to keep these, and change them by launch deploy promote {folder}, or rollback"
        raise ConfigError(option, why=why, fix=fix)
    return run, False


def _canary(deploy: CanaryDeploy) -> tuple[str, ...]:
    """Return what identifies a canary."""
    return tuple(deploy.canary_addresses) if isinstance(deploy, ProxyDeploy) else deploy.version_names


def _is_set(deploy: CanaryDeploy, option: str, words: Sequence[str]) -> bool:
    """Return whether the user gave weights, typed or in a file of options."""
    is_typed = any(word.lstrip("+").partition("=")[0] == option for word in words)
    return is_typed or bool(getattr(deploy, option.partition(".")[2]))
