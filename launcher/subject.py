"""What ``show`` and ``diff`` speak of: an experiment, a composition, or a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from launcher.compose import compose, groups
from launcher.config import run_to_tree
from launcher.errors import ConfigError
from launcher.paths import exists
from launcher.rundir import RunDir
from launcher.runs import find_run
from launcher.snapshot import load_run
from launcher.suggest import did_you_mean

DEFAULT = "default"


def resolved_tree(text: str, *, config_dir: Path | None, root: Path = Path("runs")) -> dict[str, Any]:
    """Return the resolved configuration that ``text`` names.

    Args:
        text: a run (directory, id, or how it begins), or an experiment (``default`` is none) followed by overrides, or
            overrides alone.
        config_dir: a folder of the user's own options.
        root: the folder of all runs.

    Raises:
        ConfigError: there is no such thing, or it does not compose.
    """
    if exists(RunDir(Path(text)).snapshot):
        return run_to_tree(load_run(RunDir(Path(text)).snapshot))
    words = shlex.split(text)
    if words and "=" not in words[0]:
        known = groups(config_dir).get("exp", [])
        if words[0] not in (*known, DEFAULT):
            return _of_run(text, root, known)
        words[:1] = [f"+exp={words[0]}"] if words[0] in known else []
    return compose(words, config_dir=config_dir).tree


def _of_run(word: str, root: Path, known: list[str]) -> dict[str, Any]:
    """Return the configuration of the run that ``word`` names.

    Raises:
        ConfigError: it is neither a run nor, for all that is known, an experiment.
    """
    try:
        folder = find_run(word, root).path
    except ConfigError as error:
        if "begin like this" in error.why and "no run in" not in error.why:
            raise
        why = "is neither an experiment nor a run"
        raise ConfigError(word, why=why, fix=did_you_mean(word, [*known, DEFAULT])) from error
    return run_to_tree(load_run(RunDir(folder).snapshot))
