"""What ``show`` and ``diff`` speak of: an experiment, a composition, or a run directory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from launcher.compose import compose, groups
from launcher.config import run_to_tree
from launcher.errors import ConfigError
from launcher.rundir import RunDir
from launcher.snapshot import load_run
from launcher.suggest import did_you_mean

DEFAULT = "default"


def resolved_tree(text: str, *, config_dir: Path | None) -> dict[str, Any]:
    """Return the resolved configuration that ``text`` names.

    Args:
        text: a run directory, or an experiment (``default`` is none) followed by overrides, or overrides alone.
        config_dir: a folder of the user's own options.

    Raises:
        ConfigError: there is no such thing, or it does not compose.
    """
    if RunDir(Path(text)).snapshot.is_file():
        return run_to_tree(load_run(RunDir(Path(text)).snapshot))
    words = shlex.split(text)
    if words and "=" not in words[0]:
        words[:1] = _experiment(words[0], config_dir)
    return compose(words, config_dir=config_dir).tree


def _experiment(name: str, config_dir: Path | None) -> list[str]:
    known = groups(config_dir).get("exp", [])
    if name in known:
        return [f"+exp={name}"]
    if name == DEFAULT:
        return []
    why = "is neither an experiment nor a run directory"
    raise ConfigError(name, why=why, fix=did_you_mean(name, [*known, DEFAULT]))
