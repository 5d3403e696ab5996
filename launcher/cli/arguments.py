"""Command lines of verbs that act on runs: words, flags, and flags with a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.paths import validate_path
from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean

HELP = ("-h", "--help")
ROOT = "--root"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A command line taken apart."""

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
