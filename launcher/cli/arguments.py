"""Parse the command lines of verbs: overrides with their flags, or words with the flags of one verb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.paths import validate_path
from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean

HELP = ("-h", "--help")
ROOT = "--root"
_OVERRIDE_FLAGS = ("-m", "--multirun", "--config-dir", "--json", "--help", "-h")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line of a verb that takes overrides."""

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
        elif word in _OVERRIDE_FLAGS:
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


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of a verb that takes words and flags of its own."""

    words: tuple[str, ...]
    flags: frozenset[str]
    values: dict[str, str]

    @property
    def help(self) -> bool:
        """Whether help was asked for."""
        return not self.flags.isdisjoint(HELP)

    @property
    def root(self) -> Path:
        """The folder of all runs.

        Raises:
            ConfigError: it cannot be looked at.
        """
        return self.path(ROOT, Path("runs"))

    def path(self, name: str, default: Path) -> Path:
        """Return the path that follows the flag ``name``.

        Raises:
            ConfigError: it cannot be looked at.
        """
        if name not in self.values:
            return default
        if problem := validate_path(name, self.values[name]):
            raise problem
        return Path(self.values[name]).expanduser()

    def number(self, name: str) -> int | None:
        """Return the value of ``name`` as a count; ``None`` when it was not given.

        Raises:
            ConfigError: it is no whole number.
        """
        text = self.values.get(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit()):
            raise ConfigError(name, text, why="is not a whole number", fix=f"write {name} 3")
        return int(text)

    def one_word(self, verb: str) -> str | None:
        """Return the only word; ``None`` when there is none.

        Raises:
            ConfigError: there are more.
        """
        if len(self.words) > 1:
            why = f"takes one run, not {len(self.words)}"
            raise ConfigError(verb, " ".join(self.words), why=why, fix=f"see launch {verb} --help")
        return self.words[0] if self.words else None


def parse_arguments(arguments: Sequence[str], *, flags: Sequence[str] = (), values: Sequence[str] = ()) -> Arguments:
    """Take ``arguments`` apart; ``--help`` and ``--root DIR`` are always understood.

    Args:
        arguments: what followed the verb.
        flags: those without a value (``--json``).
        values: those with one (``--rank``), as the next word or after ``=``.

    Raises:
        ConfigError: a flag that does not exist, or one that lacks its value.
    """
    words: list[str] = []
    seen: set[str] = set()
    given: dict[str, str] = {}
    remaining = iter(arguments)
    for word in remaining:
        name, equals, value = word.partition("=")
        if word in (*HELP, *flags):
            seen.add(word)
        elif name in (ROOT, *values):
            found = value if equals else next(remaining, "")
            if not found:
                raise ConfigError(name, why="lacks its value", fix=f"write {name} VALUE")
            given[name] = found
        elif word.startswith("-"):
            raise ConfigError(word, why="no such flag", fix=did_you_mean(word, [*HELP, ROOT, *flags, *values]))
        else:
            words.append(word)
    return Arguments(words=tuple(words), flags=frozenset(seen), values=given)


def _no_flag(name: str, value: str) -> str:
    """Return what to write instead of a flag: options have no dashes."""
    from launcher.config.build import options_named

    options = options_named(name.lstrip("-").replace("-", "_"), {}) if len(name) > 2 else []
    if not options:
        return did_you_mean(name, _OVERRIDE_FLAGS)
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
