"""Flags beside overrides: ``-m``, ``--config-dir``, ``dry_run=true``, ``--json``, ``--root``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.paths import validate_path
from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean

_FLAGS = ("-m", "--multirun", "--config-dir", "--json", "--help", "-h")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """A command line taken apart."""

    words: tuple[str, ...]
    """Hydra overrides."""
    multirun: bool = False
    dry_run: bool = False
    json: bool = False
    help: bool = False
    config_dir: Path | None = None
    root: Path = Path("runs")
    """The folder of all runs, in which ids are looked up."""


def parse_command_line(arguments: Sequence[str], *, takes_runs: bool = False) -> CommandLine:
    """Take flags and ``dry_run`` out of ``arguments``.

    Args:
        arguments: what followed the verb.
        takes_runs: whether the verb takes a run, and so ``--root DIR``.

    Raises:
        ConfigError: a flag that does not exist, or a folder that is not there.
    """
    words: list[str] = []
    flags: set[str] = set()
    config_dir, dry_run, root = None, False, Path("runs")
    remaining = iter(arguments)
    for word in remaining:
        name, _, value = word.partition("=")
        if name == "--config-dir":
            config_dir = _folder(value or next(remaining, ""))
        elif takes_runs and name == "--root":
            root = _root(value or next(remaining, ""))
        elif name.lstrip("+") == "dry_run":
            dry_run = _truth(value)
        elif word in _FLAGS:
            flags.add(word)
        elif word.startswith("-"):
            raise ConfigError(word, why="no such flag", fix=_no_flag(name, value))
        else:
            words.append(word)
    return CommandLine(
        words=tuple(words),
        multirun=bool(flags & {"-m", "--multirun"}),
        dry_run=dry_run,
        json="--json" in flags,
        help=bool(flags & {"-h", "--help"}),
        config_dir=config_dir,
        root=root,
    )


def _no_flag(name: str, value: str) -> str:
    """Return what to write instead of a flag: options have no dashes."""
    from launcher.config.build import options_named

    options = options_named(name.lstrip("-").replace("-", "_"), {}) if len(name) > 2 else []
    if not options:
        return did_you_mean(name, _FLAGS)
    meant = " or ".join(f"{option}={value or 'VALUE'}" for option in options[:3])
    return f"options have no dashes: write {meant}"


def _folder(value: str) -> Path:
    if problem := validate_path("--config-dir", value) if value else None:
        raise problem
    folder = Path(value).expanduser()
    if not value or not folder.is_dir():
        raise ConfigError("--config-dir", value, why="is not a folder", fix="name a folder that holds exp/, model/, …")
    return folder


def _root(value: str) -> Path:
    if not value:
        raise ConfigError("--root", why="lacks its value", fix="write --root DIR, the run.root of the runs")
    return Path(value)


def _truth(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ConfigError("dry_run", value, why="is neither true nor false", fix="set dry_run=true")
    return value.lower() == "true"
