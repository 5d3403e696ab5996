"""The base of everything a config group can hold: a frozen dataclass that refuses bad values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.errors import ConfigError, ConfigErrors


@dataclass(frozen=True, kw_only=True)
class Component:
    """A configured part of a run. Its fields are the config keys; its ``kind`` names the class in YAML."""

    group: ClassVar[str]
    """The config group, and so the first word of the option a user types."""

    kind: ClassVar[str]
    """The value of the ``kind`` key that chooses this class."""

    headline: ClassVar[tuple[str, ...]] = ()
    """Fields that plans show even where they hold their default."""

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise ConfigErrors(problems)

    def problems(self) -> Iterator[ConfigError]:
        """Yield everything wrong with the values, each naming the option as the user typed it."""
        yield from ()

    def refuse(self, field: str, why: str, fix: str) -> ConfigError:
        """Return the error for one field of this component."""
        return ConfigError(f"{self.group}.{field}", getattr(self, field), why=why, fix=fix)

    def below(self, minimum: float, *fields: str) -> Iterator[ConfigError]:
        """Yield an error for each of ``fields`` that is set and smaller than ``minimum``."""
        for field in fields:
            value = getattr(self, field)
            if isinstance(value, int | float) and value < minimum:
                yield self.refuse(field, f"must be at least {minimum:g}", f"set {self.group}.{field}={minimum:g}")
