"""``launch deploy``: render what deploys a server, and write it into a folder."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.arguments import Arguments, is_override
from launcher.config.deploy.base import RenderedDeploy
from launcher.config.run import Run
from launcher.deploy.folder import difference, write
from launcher.deploy.prepare import prepare, prepare_saved
from launcher.deploy.registry import render
from launcher.errors import ConfigError
from launcher.protocol.plan import Plan
from launcher.utils.text import counted

ACTIONS = ("apply", "status", "delete")
"""First words that act on the cluster of a rendered folder."""


def run(arguments: Arguments) -> int:
    """Render a deployment and write it, or act on the cluster; with ``--diff``, compare."""
    if arguments.overrides and arguments.overrides[0] in ACTIONS:
        return _act(arguments)
    served, plan = _prepared(arguments)
    deploy = served.deploy
    assert isinstance(deploy, RenderedDeploy), "deploy=none has no hosts, so there is no plan of it"
    files, folder = render(served, plan), Path(deploy.out)
    if arguments.diff:
        text = difference(folder, files)
        print(text or "no difference\n", end="")
        return 1 if text else 0
    if arguments.dry_run:
        for path, text in files.items():
            print(f"# {path}\n{text}", end="")
        return 0
    written = write(folder, files)
    for word, paths in (("wrote", written.changed), ("removed", written.removed), ("kept", written.kept)):
        for path in paths:
            print(f"{word} {folder / path}")
    same = len(files) - len(written.changed)
    print(f"{counted(len(files), 'file')} in {folder}, {same} unchanged")
    return 0


def _act(arguments: Arguments) -> int:
    """Apply a folder, show its state in the cluster, or delete it there.

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
    deployment = cluster.open_deployment(Path(folders[0]))
    if arguments.diff:
        text = cluster.difference(deployment)
        print(text or "no difference\n", end="")
        return 1 if text else 0
    if action == "apply":
        cluster.apply(deployment, print)
    elif action == "delete":
        cluster.delete(deployment, print)
    else:
        print("\n".join(cluster.status(deployment)))
    return 0


def _prepared(arguments: Arguments) -> tuple[Run, Plan]:
    """Return the server that the words name, and its plan."""
    first, *rest = arguments.overrides or [""]
    if not first or is_override(first):
        return prepare(arguments.overrides, config_dir=arguments.config_dir)
    from launcher.cli.saved_run import find_run_or_option

    return prepare_saved(find_run_or_option(first, arguments), rest)
