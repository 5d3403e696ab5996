"""A run that is on disk already, to be started again with values changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.commandline import CommandLine
from launcher.compose import Composed, groups
from launcher.config import KINDS, Run, build_run, run_to_tree, suggestion
from launcher.errors import ConfigError, ConfigErrors
from launcher.launching import start
from launcher.overrides import Override, parse_overrides, ways_to_write
from launcher.prepare import prepare
from launcher.render import render
from launcher.rundir import RunDir
from launcher.runs import find_run, look
from launcher.schema import NO_SUCH_OPTION, to_tree
from launcher.secrecy import is_secret_name
from launcher.snapshot import load_run
from launcher.terminal import json_text
from launcher.wording import quoted_word


def find_run_or_option(word: str, line: CommandLine) -> Path:
    """Return the folder of the run that ``word`` names, of a verb that takes options there too.

    Raises:
        ConfigError: there is no such run; the message says how an option of that name is written.
    """
    try:
        return find_run(word, line.root).path
    except ConfigError as error:
        meant = ways_to_write(word, groups(line.config_dir))
        if not meant:
            raise
        why = "is no run, and not of the form option=value"
        raise ConfigError(word, why=why, fix=f"write {' or '.join(meant)}") from error


def stored_run(folder: Path, words: Sequence[str]) -> Run:
    """Return the run that the run.yaml in ``folder`` describes, with values changed by ``words``.

    Raises:
        ConfigErrors: everything that is wrong with the changes, or with the run of another version.
    """
    mistakes: list[ConfigError] = []
    tree = run_to_tree(load_run(RunDir(folder).snapshot))
    for override in parse_overrides(words, {}, sweeping=False, report=mistakes.append):
        _set(tree, override, mistakes)
    run = build_run(tree, mistakes.append)
    if run is None or mistakes:
        raise ConfigErrors(mistakes)
    return run


def start_stored(run: Run, line: CommandLine, *, folder: Path) -> int:
    """Start ``run`` and return its exit code, or print its plan where ``line`` asks for that.

    Args:
        run: the stored run, changed.
        line: what the user typed.
        folder: the run directory that it was stored in.

    Raises:
        ConfigErrors: what stands against it.
    """
    if line.multirun or line.config_dir:
        flag = "-m" if line.multirun else "--config-dir"
        raise ConfigError(flag, why="has no meaning for a stored run, which is composed already", fix="leave it out")
    if line.json and not line.dry_run:
        raise ConfigError("--json", why="belongs to a plan", fix="add dry_run=true")
    for name in _missing_secrets(folder):
        why = f"the run had {name} from its shell, and this shell does not set it"
        print(f"warning: {why}: export it if ranks need it", file=sys.stderr)
    prepared = prepare(Composed(run=run, tree=run_to_tree(run), sweep=None, overrides=line.words[1:]))
    if not line.dry_run:
        return start(prepared)
    plan = prepared.plan
    print(json_text(to_tree(plan)) if line.json else render(plan), end="")
    return 0


def _missing_secrets(folder: Path) -> list[str]:
    """Return the secret variables that the run was sent and that this process does not have: no file holds them."""
    forward = look(RunDir(folder)).plan.get("forward", [])
    return [name for name in forward if is_secret_name(name) and name not in os.environ]


def _set(tree: dict[str, Any], override: Override, mistakes: list[ConfigError]) -> None:
    key, given = override.key, override.value
    if "." not in key:
        if key in (*KINDS, "run", "exp", "sweep"):
            fix = "change single values (job.steps=400), or start a new run with checkpoint.resume=DIR"
            mistakes.append(ConfigError(key, why="would change the kind of run", fix=fix))
        else:
            fix = suggestion(key, tree, typed={key: override.typed})
            mistakes.append(ConfigError(key, why=NO_SUCH_OPTION, fix=fix))
        return
    from omegaconf.errors import OmegaConfBaseException

    *path, name = key.split(".")
    node = tree
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            mistakes.append(ConfigError(key, why=f"{part} is a single value", fix=f"set {key.rpartition('.')[0]}"))
            return
    try:
        value = _resolved(given)
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        fix = f"name a variable that exists; to give this text itself: {quoted_word(key, override.typed)}"
        mistakes.append(ConfigError(key, given, why=why, fix=fix))
        return
    old = node.get(name)
    node[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value


def _resolved(value: Any) -> Any:
    """Return ``value`` with its ``${oc.env:…}`` replaced; options of the stored run are values, not names."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]
