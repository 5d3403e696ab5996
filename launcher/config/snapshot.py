"""run.yaml: the resolved run that ranks load instead of composing again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from launcher.config.build import build_run
from launcher.config.plugins import load_plugins_of_run
from launcher.config.registry import GROUPS_ADDED_LATER
from launcher.config.run import Run, run_to_tree
from launcher.errors import ConfigError, ConfigErrors
from launcher.utils.files import read_regular, sha256_of, write_atomic

_HEADER = "# The resolved configuration of this run. Ranks refuse to start when its hash is not the plan's.\n"
_MAX_BYTES = 8 << 20
_LINE_BREAKS = frozenset("\x85\u2028\u2029")


class _Dumper(yaml.SafeDumper):
    """Writes every text so that it reads back the same."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return the node of a text, quoted if it has what YAML counts as line breaks.

        Outside of double quotes YAML reads them back as spaces.
        """
        return self.represent_scalar(
            "tag:yaml.org,2002:str", text, style=None if _LINE_BREAKS.isdisjoint(text) else '"'
        )


_Dumper.add_representer(str, _Dumper.represent_text)


def dump_run(run: Run) -> str:
    """Return the text of run.yaml."""
    body: str = yaml.dump(run_to_tree(run), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return _HEADER + body


def save_run(run: Run, path: Path) -> str:
    """Write run.yaml and return its SHA-256."""
    text = dump_run(run)
    write_atomic(path, text)
    return sha256_of(text.encode())


def load_run(path: Path, *, expected_hash: str | None = None, is_own_run: bool = False) -> Run:
    """Return the run that ``path`` (a run.yaml) holds.

    Args:
        path: the file.
        expected_hash: its SHA-256, from the plan; then this process belongs to the run.
        is_own_run: whether this process was started for this run; otherwise nothing that the file names is imported.

    Raises:
        Unfit: this process belongs to the run, and lacks one of its plugins.
        ConfigError: the file is missing, its hash differs from ``expected_hash``, or it is not a run of this version.
    """
    payload = _read(path)
    found = sha256_of(payload)
    if expected_hash is not None and found != expected_hash:
        why = f"its hash is {found[:12]}… and the plan says {expected_hash[:12]}…: it changed after the plan was made"
        raise ConfigError("run.yaml", path, why=why, fix="start the run again; never edit run.yaml of a running run")
    mistakes: list[ConfigError] = []
    tree = _parse(payload, path)
    plugins = load_plugins_of_run(tree, is_own_run=is_own_run or expected_hash is not None)
    run = build_run({**GROUPS_ADDED_LATER, **tree, "plugins": plugins}, mistakes.append)
    if run is None:
        raise ConfigErrors(mistakes)
    return run


def read_snapshot(path: Path) -> dict[str, Any]:
    """Return the tree in a run.yaml of any version.

    Raises:
        ConfigError: it is missing, is a link or no regular file, or holds something else.
    """
    return _parse(_read(path), path)


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, limit=_MAX_BYTES)
    except OSError as error:
        raise ConfigError(
            "run.yaml", path, why=error.strerror or "cannot be read", fix="name a run directory"
        ) from error


def _parse(payload: bytes, path: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(payload, Loader=loader)):
            raise ValueError("it has YAML aliases, which a run never writes and which can expand to billions of values")
        tree = yaml.load(payload, Loader=loader)  # noqa: S506 (both are safe)
        if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
            raise ValueError("it is not a set of options")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = f"is not a valid run.yaml: {str(error).splitlines()[0] or type(error).__name__}"
        raise ConfigError("run.yaml", path, why=why, fix="name another run") from error
    return tree
