"""Override words of the command line: Hydra's grammar, checked before Hydra sees them.

Hydra stops at the first mistake, accepts any key behind ``+`` and has no did-you-mean. So each word is parsed by
Hydra's own parser, group choices are checked here, and values are passed on as forced (``++``): whether their key
exists is decided once, for all of them, against the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import ConfigError
from launcher.schema import Report
from launcher.suggest import did_you_mean

ADDED_GROUPS = ("exp", "sweep")
"""Groups that are not in the defaults list, so Hydra wants ``+`` before them; we do not mind without."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """One accepted word."""

    key: str
    """Group or dotted option, without ``+``."""
    word: str
    """What Hydra is given."""
    is_group: bool
    choices: tuple[str, ...] | None = None
    """The values to try, when the word is a sweep (``job.seed=1,2,3``)."""

    @property
    def value(self) -> str:
        """What stands behind the key, as the user typed it."""
        return self.word.partition("=")[2]


def parse_overrides(
    words: Sequence[str], groups: Mapping[str, Sequence[str]], *, sweeping: bool, report: Report
) -> list[Override]:
    """Return the words that make sense; report each of the others.

    Args:
        words: what the user typed.
        groups: the options of every config group.
        sweeping: whether several values for one option are wanted (``-m`` or a sweep).
        report: called once per mistake.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, accepted = OverridesParser.create(), []
    for word in words:
        try:
            parsed = parser.parse_override(word)
        except HydraException:
            report(_not_an_override(word))
            continue
        override = _classify(word, parsed, groups, sweeping=sweeping, report=report)
        if override is not None:
            accepted.append(override)
    return accepted


def _not_an_override(word: str) -> ConfigError:
    fix = "write it as option=value, in quotes when the value holds spaces: \"job.sample_prompt='a b'\""
    return ConfigError(word, why="is not an override of the form option=value", fix=fix)


def _classify(
    word: str, parsed: Any, groups: Mapping[str, Sequence[str]], *, sweeping: bool, report: Report
) -> Override | None:
    key = parsed.key_or_group
    if parsed.is_delete():
        report(ConfigError(word, why="takes an option away, and every option is needed", fix=f"set {key}=<value>"))
        return None
    if key.startswith("hydra.") and key != "hydra.searchpath":
        report(ConfigError(key, why="does nothing here", fix="use run.root, run.name and run.dir, or -m for sweeps"))
        return None
    choices = _choices(parsed)
    if choices is not None and not sweeping:
        report(ConfigError(key, ",".join(choices), why="is several values", fix="add -m to run them all, or [a,b]"))
        return None
    if key.partition("@")[0] in groups:
        return _group_choice(key, parsed, choices, groups, report)
    if key.endswith(".kind") or key == "kind":
        group = key.partition(".")[0]
        report(ConfigError(key, why="follows from the option chosen", fix=f"set {group}=<option>"))
        return None
    bare = word.lstrip("+")
    return Override(key=key, word=bare if key == "hydra.searchpath" else f"++{bare}", is_group=False, choices=choices)


def _choices(parsed: Any) -> tuple[str, ...] | None:
    if not parsed.is_sweep_override():
        return None
    return tuple(str(item) for item in parsed.sweep_string_iterator())


def _group_choice(
    key: str, parsed: Any, choices: tuple[str, ...] | None, groups: Mapping[str, Sequence[str]], report: Report
) -> Override | None:
    options = groups[key]
    wanted = choices if choices is not None else (parsed.get_value_element_as_str(),)
    wanted = tuple(option.lower() if option in ("True", "False") else option for option in wanted)  # truth values
    unknown = [option for option in wanted if option not in options]
    for option in unknown:
        report(ConfigError(key, option, why="no such option", fix=did_you_mean(option, options)))
    if unknown:
        return None
    prefix = "+" if key in ADDED_GROUPS else ""
    quoted = ",".join(f"'{option}'" for option in wanted)  # Hydra refuses compile=true as a truth value
    return Override(key=key, word=f"{prefix}{key}={quoted}", is_group=True, choices=choices)
