"""``launch deploy``: render what deploys a server, and write it into a folder."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.arguments import Arguments, is_override
from launcher.config.deploy.base import RenderedDeploy
from launcher.config.run import Run
from launcher.deploy.folder import difference, write
from launcher.deploy.prepare import prepare, prepare_saved
from launcher.deploy.registry import render
from launcher.protocol.plan import Plan
from launcher.utils.text import counted


def run(arguments: Arguments) -> int:
    """Render a deployment and write it; with ``--diff``, print what would change."""
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


def _prepared(arguments: Arguments) -> tuple[Run, Plan]:
    """Return the server that the words name, and its plan."""
    first, *rest = arguments.overrides or [""]
    if not first or is_override(first):
        return prepare(arguments.overrides, config_dir=arguments.config_dir)
    from launcher.cli.saved_run import find_run_or_option

    return prepare_saved(find_run_or_option(first, arguments), rest)
