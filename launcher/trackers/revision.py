"""Which revision of the code a run uses."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 5


@dataclass(frozen=True, kw_only=True)
class Revision:
    """A git commit."""

    commit: str
    dirty: bool
    """Whether tracked files differ from it."""


def find_revision(*folders: Path) -> Revision | None:
    """Return the revision of the first of ``folders`` that lies in a git repository, if git is there and answers."""
    for folder in folders:
        commit = _git(folder, "rev-parse", "HEAD")
        if commit:
            changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
            return Revision(commit=commit, dirty=changes != "")
    return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or ``None`` when it fails. It takes no locks that others would wait for."""
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=env, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()
