"""What trackers record of a run besides its metrics: configuration and git revision."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launcher
from launcher.config.run import Run, run_to_tree
from launcher.errors.secrets import redact
from launcher.protocol.plan import Plan


def config_of(run: Run, plan: Plan) -> dict[str, Any]:
    """Return the configuration and what it ran on, without secrets of the environment."""
    revision = find_revision(Path(launcher.__file__).parent, Path.cwd())
    config: dict[str, Any] = redact(
        {
            **run_to_tree(run),
            "world_size": plan.world_size,
            "run_dir": plan.run_dir,
            "run_hash": plan.run_hash,
            "launcher_version": launcher.__version__,
            "git_commit": revision.commit if revision else None,
            "git_dirty": revision.dirty if revision else None,
        },
        os.environ,
    )
    return config


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """Yield name and value of each option; lists, null and empty mappings as JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            is_plain = isinstance(value, str | int | float)
            yield f"{prefix}{name}", value if is_plain else json.dumps(value, ensure_ascii=False)


_TIMEOUT_S = 5


@dataclass(frozen=True, kw_only=True)
class Revision:
    """A git commit."""

    commit: str
    dirty: bool
    """Whether tracked files differ from it."""


def find_revision(*folders: Path) -> Revision | None:
    """Return the git revision of the first of ``folders`` in a repository, if git answers."""
    for folder in folders:
        commit = _git(folder, "rev-parse", "HEAD")
        if commit:
            changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
            return Revision(commit=commit, dirty=changes != "")
    return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return git's output, or ``None`` if it fails; it takes no locks."""
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=env, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()
