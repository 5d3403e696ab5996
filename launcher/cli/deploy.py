"""``launch deploy``: render what deploys a server, and write it into a folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.arguments import Arguments, is_override
from launcher.config.deploy.base import RenderedDeploy
from launcher.config.deploy.canary import CanaryDeploy
from launcher.config.run import Run
from launcher.deploy.folder import LIST, difference, locked, write
from launcher.deploy.prepare import prepare, prepare_saved
from launcher.deploy.registry import render
from launcher.deploy.rerender import over_rendered
from launcher.errors import ConfigError
from launcher.protocol.plan import Plan
from launcher.utils.text import close_choices, counted, did_you_mean

ACTIONS = ("apply", "status", "promote", "rollback", "delete")
"""First words that act on what a rendered folder is for."""


def run(arguments: Arguments) -> int:
    """Render a deployment and write it, or act on what was rendered; with ``--diff``, compare."""
    if arguments.overrides and arguments.overrides[0] in ACTIONS:
        return _act(arguments)
    served, plan = _prepared(arguments)
    assert isinstance(served.deploy, RenderedDeploy), "deploy=none has no hosts, so there is no plan of it"
    folder = Path(served.deploy.out)
    if not (arguments.diff or arguments.dry_run):
        with locked(folder):
            return _write(served, plan, folder, arguments.overrides)
    files = render(over_rendered(served, folder, arguments.overrides)[0], plan)
    if arguments.diff:
        text = difference(folder, files)
        print(text or "no difference\n", end="")
        return 1 if text else 0
    for path, content in files.items():
        print(f"# {path}\n{content}" if isinstance(content, str) else f"# {path}: {len(content)} bytes\n", end="")
    return 0


def _write(served: Run, plan: Plan, folder: Path, words: Sequence[str]) -> int:
    """Write the files, and print what changed."""
    kept, is_promoted = over_rendered(served, folder, words)
    files = render(kept, plan)
    written = write(folder, files, is_promoted=is_promoted)
    for word, paths in (("wrote", written.changed), ("removed", written.removed), ("kept", written.kept)):
        for path in paths:
            print(f"{word} {folder / path}")
    if kept.deploy != served.deploy:
        assert isinstance(kept.deploy, CanaryDeploy), "only weights are kept"
        share, name = kept.deploy.canary_share, kept.deploy.version_names[1]
        print(f"kept the weights in {folder}: {name} gets {share} % of the requests")
    if isinstance(kept.deploy, CanaryDeploy):
        for line in kept.deploy.canary_warnings():
            print(f"warning: {line}", file=sys.stderr)
    same = len(files) - len(written.changed)
    print(f"{counted(len(files), 'file')} in {folder}, {same} unchanged")
    return 0


def _act(arguments: Arguments) -> int:
    """Apply a folder, show its state, give its version more requests or none, or delete it.

    Raises:
        ConfigError: the words are not an action and a folder.
    """
    from launcher.deploy import cluster

    action, *folders = arguments.overrides
    if len(folders) != 1 or is_override(folders[0]):
        why = "takes one folder that launch deploy rendered, and no overrides"
        raise ConfigError(
            f"deploy {action}", " ".join(folders) or None, why=why, fix=f"write launch deploy {action} DIR"
        )
    if arguments.diff and action != "apply":
        fix = f"write launch deploy {action} DIR, or launch deploy apply DIR --diff"
        raise ConfigError("--diff", why=f"launch deploy {action} renders and applies nothing", fix=fix)
    folder = Path(folders[0])
    if action in ("promote", "rollback"):
        return _shift(folder, is_promotion=action == "promote")
    if action == "status":
        return _show(folder)
    deployment = cluster.open_deployment(folder)
    for line in cluster.check_files(deployment):
        print(line, file=sys.stderr)
    if arguments.diff:
        text = cluster.difference(deployment)
        print(text or "no difference\n", end="")
        return 1 if text else 0
    if action == "apply":
        cluster.apply(deployment, print)
    else:
        cluster.delete(deployment, print)
    return 0


def _shift(folder: Path, *, is_promotion: bool) -> int:
    """Give a new version more requests, or none."""
    from launcher.deploy.canary.promote import open_canary, promote, rollback

    canary = open_canary(folder)
    if not is_promotion:
        return rollback(canary, print)
    try:
        with locked(folder, option="DIR"):
            return promote(open_canary(folder), lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"interrupted: the weights stay; launch deploy promote {folder} goes on, rollback {folder} goes back")
        return 128 + signal.SIGINT


def _show(folder: Path) -> int:
    """Show workloads and pods in the cluster, and the weights and gates of a canary."""
    from launcher.config.deploy.proxy import ProxyDeploy
    from launcher.deploy import cluster
    from launcher.deploy.canary import promote

    deploy = cluster.load_rendered(folder).deploy
    if not isinstance(deploy, ProxyDeploy):
        print("\n".join(cluster.status(cluster.open_deployment(folder))))
    if isinstance(deploy, ProxyDeploy) or (isinstance(deploy, CanaryDeploy) and deploy.has_canary):
        print("\n".join(promote.status(promote.open_canary(folder))))
    return 0


def _prepared(arguments: Arguments) -> tuple[Run, Plan]:
    """Return the server that the words name, and its plan."""
    first, *rest = arguments.overrides or [""]
    if not first or is_override(first):
        return prepare(arguments.overrides, config_dir=arguments.config_dir)
    from launcher.cli.saved_run import find_run_or_option

    if (Path(first) / LIST).is_file():
        why = "is a folder that launch deploy rendered, and no run"
        raise ConfigError(
            "deploy", first, why=why, fix=f"write launch deploy apply {first}, or {' or '.join(ACTIONS[1:])}"
        )
    if rest and close_choices(first, ACTIONS) and not any(map(is_override, rest)):
        raise ConfigError("deploy", first, why="is no action", fix=did_you_mean(first, ACTIONS))
    return prepare_saved(find_run_or_option(first, arguments), rest)
