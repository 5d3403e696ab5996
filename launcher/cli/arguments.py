"""Arguments of verbs: how one is declared, the parsed values, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Literal

from launcher.config.paths import expand_home, validate_path
from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean


class Completion(Enum):
    """Completions of an argument in a shell."""

    RUN = auto()
    OVERRIDE = auto()
    EXPERIMENT = auto()
    GROUP = auto()
    FILE = auto()
    """The shell completes paths itself."""


@dataclass(frozen=True, kw_only=True)
class Positional:
    """A positional argument (``RUN``)."""

    name: str
    """Field of :class:`Arguments`."""
    metavar: str
    help: str
    nargs: Literal["?", "*"] | None = None
    """Optional, any number, or exactly one."""
    convert: Callable[[str], object] = str
    completes: tuple[Completion | str, ...] = ()
    """Kinds of words that a shell offers, and words themselves."""

    @property
    def usage(self) -> str:
        """Return how a synopsis shows it."""
        return {None: "{}", "?": "[{}]", "*": "[{}…]"}[self.nargs].format(self.metavar)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A flag (``--json``), or an option with a value (``--root DIR``)."""

    names: tuple[str, ...]
    help: str
    metavar: str | None = None
    """The value; ``None`` for a flag."""
    convert: Callable[[str], object] = str
    completes: tuple[Completion | str, ...] = ()
    is_hidden: bool = False
    """Whether the option is left out of help and completion.
    The verb raises an error that explains why it has no effect."""

    @property
    def destination(self) -> str:
        """Return the field of :class:`Arguments`."""
        return self.names[-1].lstrip("-").replace("-", "_")

    @property
    def usage(self) -> str:
        """Return how a synopsis shows it."""
        return f"[{self.names[0]} {self.metavar}]" if self.metavar else f"[{self.names[0]}]"


class Arguments(argparse.Namespace):
    """The parsed command line of one verb; what the verb does not declare has its default."""

    overrides: Sequence[str] = ()
    """Hydra overrides, without ``dry_run``."""
    run: str | None = None
    runs: Sequence[str] = ()
    source: str = ""
    """An experiment or a run."""
    a: str = ""
    b: str = ""
    groups: Sequence[str] = ()
    action: str = ""
    folder: str = ""
    settings: Sequence[str] = ()
    """Options of the verb itself, as ``name=value``."""
    shell: str | None = None
    words: Sequence[str] | None = None

    dry_run: bool = False
    multirun: bool = False
    json: bool = False
    config_dir: Path | None = None
    root: Path = Path("runs")
    """The folder of all runs, in which ids are looked up."""
    output: Path | None = None
    follow: bool = False
    agents: bool = False
    rank: int | None = None
    host: str | None = None
    lines: int | None = None
    now: bool = False
    diff: bool = False
    threshold: str | None = None
    agree: bool = False


def is_override(word: str) -> bool:
    """Return whether a word is a Hydra override, not the name of a verb or a run."""
    return "=" in word or word.startswith(("+", "~"))


def path_value(option: str) -> Callable[[str], Path]:
    """Return a conversion that accepts a path this process may read.

    Raises:
        ConfigError: by the conversion; the path cannot be examined.
    """

    def convert(text: str) -> Path:
        if error := validate_path(option, text):
            raise error
        return Path(expand_home(text))

    return convert


def config_dir_value(text: str) -> Path:
    """Return the folder that ``--config-dir`` names.

    Raises:
        ConfigError: it is not a folder.
    """
    folder = path_value("--config-dir")(text)
    if not folder.is_dir():
        raise ConfigError("--config-dir", text, why="is not a folder", fix="name a folder that holds exp/, model/, …")
    return folder


def count_value(option: str) -> Callable[[str], int]:
    """Return a conversion that accepts a whole number from 0 on.

    Raises:
        ConfigError: by the conversion; the text is not a whole number.
    """

    def convert(text: str) -> int:
        if not (text.isascii() and text.isdigit()):
            raise ConfigError(option, text, why="is not a whole number", fix=f"write {option} 3")
        return int(text)

    return convert


def choice_value(name: str, choices: Sequence[str]) -> Callable[[str], str]:
    """Return a conversion that accepts one of a few words.

    Raises:
        ConfigError: by the conversion; the word is not one of them.
    """

    def convert(text: str) -> str:
        if text not in choices:
            raise ConfigError(name, text, why="is not one of the choices", fix=did_you_mean(text, choices))
        return text

    return convert


def truth_value(option: str, text: str) -> bool:
    """Return whether ``text`` is ``true``; ``false`` is the other choice.

    Raises:
        ConfigError: it is neither.
    """
    if text.lower() not in ("true", "false"):
        raise ConfigError(option, text, why="is neither true nor false", fix=f"set {option}=true")
    return text.lower() == "true"
