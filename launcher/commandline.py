"""Flags that stand beside overrides: ``-m``, ``--config-dir``, ``dry_run=true``, ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigError
from launcher.suggest import did_you_mean

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


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Take flags and ``dry_run`` out of ``arguments``.

    Raises:
        ConfigError: a flag that does not exist, or a folder that is not there.
    """
    words: list[str] = []
    flags: set[str] = set()
    config_dir, dry_run = None, False
    remaining = iter(arguments)
    for word in remaining:
        name, _, value = word.partition("=")
        if name == "--config-dir":
            config_dir = _folder(value or next(remaining, ""))
        elif name.lstrip("+") == "dry_run":
            dry_run = _truth(value)
        elif word in _FLAGS:
            flags.add(word)
        elif word.startswith("-"):
            raise ConfigError(word, why="no such flag", fix=did_you_mean(word, _FLAGS))
        else:
            words.append(word)
    return CommandLine(
        words=tuple(words),
        multirun=bool(flags & {"-m", "--multirun"}),
        dry_run=dry_run,
        json="--json" in flags,
        help=bool(flags & {"-h", "--help"}),
        config_dir=config_dir,
    )


def _folder(value: str) -> Path:
    folder = Path(value)
    if not value or not folder.is_dir():
        raise ConfigError("--config-dir", value, why="is not a folder", fix="name a folder that holds exp/, model/, …")
    return folder


def _truth(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ConfigError("dry_run", value, why="is neither true nor false", fix="set dry_run=true")
    return value.lower() == "true"
