"""What ``show`` and ``diff`` speak of: an experiment, a composition, or a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.compose import compose, groups
from launcher.config import run_to_tree
from launcher.errors import ConfigError
from launcher.overrides import ways_to_write
from launcher.paths import exists
from launcher.rundir import RunDir
from launcher.runs import find_run
from launcher.stored import stored_run
from launcher.suggest import did_you_mean

DEFAULT = "default"


def words_in(text: str) -> list[str]:
    """Return the words of one side of a comparison: a run or an experiment, and overrides behind it.

    Raises:
        ConfigError: a quote that begins in it does not end.
    """
    if exists(RunDir(Path(text)).snapshot):
        return [text]
    try:
        return shlex.split(text)
    except ValueError as error:
        fix = "quote each override as in a shell: \"default 'job.sample_prompt=it is'\""
        raise ConfigError(text, why=f"cannot be taken apart: {error}", fix=fix) from error


def resolved_tree(words: Sequence[str], *, config_dir: Path | None, root: Path = Path("runs")) -> dict[str, Any]:
    """Return the resolved configuration that ``words`` name.

    Args:
        words: a run (directory, id, or how it begins), or an experiment (``default`` is none) followed by overrides, or
            overrides alone.
        config_dir: a folder of the user's own options.
        root: the folder of all runs.

    Raises:
        ConfigError: there is no such thing, or it does not compose.
    """
    first, *rest = words or ("",)
    is_run = exists(RunDir(Path(first)).snapshot)
    if "=" in first and not is_run:
        return compose(words, config_dir=config_dir).tree
    known = groups(config_dir)
    if is_run or first not in (*known.get("exp", []), DEFAULT):
        return _of_run(first, rest, root, known)
    return compose([*([] if first == DEFAULT else [f"+exp={first}"]), *rest], config_dir=config_dir).tree


def _of_run(word: str, changes: Sequence[str], root: Path, known: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the configuration of the run that ``word`` names, with values changed.

    Raises:
        ConfigError: it is neither a run nor, for all that is known, an experiment.
    """
    try:
        folder = find_run(word, root).path
    except ConfigError as error:
        if "begin like this" in error.why and "no run in" not in error.why:
            raise
        why, meant = "is neither an experiment nor a run", ways_to_write(word, known)
        fix = f"write {' or '.join(meant)}" if meant else did_you_mean(word, [*known.get("exp", []), DEFAULT])
        raise ConfigError(word, why=why, fix=fix) from error
    return run_to_tree(stored_run(folder, changes))
