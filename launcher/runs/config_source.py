"""The configuration that a word of the command line names: a saved run or an experiment."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.build import build_run, suggest_option
from launcher.config.compose import compose
from launcher.config.folders import groups
from launcher.config.option_text import quoted_word
from launcher.config.overrides import Override, parse_overrides, suggest_overrides
from launcher.config.paths import anchored
from launcher.config.plugins import take_plugins, used_plugins
from launcher.config.registry import KINDS
from launcher.config.run import Run, run_to_tree
from launcher.config.snapshot import load_run
from launcher.errors import ConfigError, ConfigErrors
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import read_session_file
from launcher.runs.index import find_run
from launcher.utils.files import exists
from launcher.utils.schema import NO_SUCH_OPTION
from launcher.utils.text import did_you_mean

NO_EXPERIMENT = "default"
_REPLACEABLE = ("parallel", "precision")
"""Groups that a saved run can choose again: how it computes, not what."""


def split_source(text: str) -> list[str]:
    """Return the words of one side of a comparison: a run or an experiment, then overrides.

    Raises:
        ConfigError: a quote is not closed.
    """
    if exists(RunDir(Path(text)).snapshot):
        return [text]
    try:
        return shlex.split(text)
    except ValueError as error:
        fix = "quote each override as for a shell: \"default 'job.sample_prompt=it is'\""
        raise ConfigError(text, why=f"cannot be parsed: {error}", fix=fix) from error


def resolved_config(words: Sequence[str], *, config_dir: Path | None, root: Path = Path("runs")) -> dict[str, Any]:
    """Return the resolved configuration that ``words`` name.

    Args:
        words: a run (directory, id, or how it begins), or an experiment (``default`` is none) followed by overrides, or
            overrides alone.
        config_dir: a folder of the user's own options.
        root: the folder of all runs.

    Raises:
        ConfigError: there is no such run or experiment, or it does not compose.
    """
    words = take_plugins(words)
    first, *rest = words or ("",)
    is_run = exists(RunDir(Path(first)).snapshot)
    if "=" in first and not is_run:
        return compose(words, config_dir=config_dir).tree
    known = groups(config_dir)
    if is_run or first not in (*known.get("exp", []), NO_EXPERIMENT):
        return _config_of_run(first, rest, root, known)
    return compose([*([] if first == NO_EXPERIMENT else [f"+exp={first}"]), *rest], config_dir=config_dir).tree


def _config_of_run(word: str, changes: Sequence[str], root: Path, known: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the configuration of the run that ``word`` names, with values changed.

    Raises:
        ConfigError: it is neither a run nor a known experiment.
    """
    try:
        folder = find_run(word, root).path
    except ConfigError as error:
        is_path = "/" in word or os.path.lexists(word)
        if is_path or ("begin with it" in error.why and "no run in" not in error.why):
            raise
        why, meant = "is neither an experiment nor a run", suggest_overrides(word, known)
        fix = f"write {' or '.join(meant)}" if meant else did_you_mean(word, [*known.get("exp", []), NO_EXPERIMENT])
        raise ConfigError(word, why=why, fix=fix) from error
    return run_to_tree(load_saved_run(folder, changes))


def load_saved_run(folder: Path, words: Sequence[str]) -> Run:
    """Return the run saved in ``folder``, with values changed by ``words``.

    Relative paths of the saved run start from the folder that it was started in, those of ``words`` from this one.

    Raises:
        ConfigErrors: every error in the changes, or in the run.yaml of another version.
    """
    words = take_plugins(words)
    mistakes: list[ConfigError] = []
    tree = run_to_tree(_from_its_folder(load_run(RunDir(folder).snapshot), RunDir(folder)))
    overrides = parse_overrides(words, {}, sweeping=False, report=mistakes.append)
    for override in sorted(overrides, key=lambda override: "." in override.key):  # groups first
        _apply_override(tree, override, mistakes)
    run = build_run(tree, mistakes.append)
    if run is None or mistakes:
        raise ConfigErrors(mistakes)
    return replace(run, plugins=used_plugins(run))  # the changes may use others


def _from_its_folder(run: Run, run_dir: RunDir) -> Run:
    """Return a saved run whose paths lead to the same files from the current folder."""
    record = read_session_file(run_dir)
    if record is None or not record.cwd.startswith("/") or record.cwd == str(Path.cwd()):
        return run
    if not run.backend.shares_paths:
        return run  # they are paths of other machines
    folder = Path(record.cwd)
    return replace(run, **{group: anchored(getattr(run, group), folder) for group in KINDS})


def _apply_override(tree: dict[str, Any], override: Override, mistakes: list[ConfigError]) -> None:
    key, given = override.key, override.value
    if key in _REPLACEABLE:
        try:
            tree[key] = compose([f"{key}={given}"]).tree[key]
        except ConfigErrors as several:
            mistakes.extend(several.errors)
        return
    if "." not in key:
        if key in (*KINDS, "run", "exp", "sweep"):
            fix = "change single values (job.steps=400), or start a new run with checkpoint.resume=DIR"
            mistakes.append(ConfigError(key, why="would change the kind of run", fix=fix))
        else:
            fix = suggest_option(key, tree, typed={key: override.typed})
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
        value = _resolve_environment(given)
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        fix = f"name a variable that exists; to pass this text literally: {quoted_word(key, override.typed)}"
        mistakes.append(ConfigError(key, given, why=why, fix=fix))
        return
    old = node.get(name)
    node[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value


def _resolve_environment(value: Any) -> Any:
    """Return ``value`` with each ``${oc.env:…}`` replaced."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]
