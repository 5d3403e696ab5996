"""``launch list``: groups, their options, and what each key means."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.cli.arguments import Arguments
from launcher.config.component import Component, class_title, field_docs
from launcher.config.folders import groups, option_folders, options_in
from launcher.config.option_text import value_text
from launcher.config.plugins import take_plugins
from launcher.config.registry import KINDS, component_class
from launcher.config.run import RunOptions
from launcher.errors import ConfigError
from launcher.plugins.loading import LoadedPlugin, loaded_plugins, origin_of
from launcher.utils.schema import defaults, describe_type, field_types
from launcher.utils.text import did_you_mean, format_table, terminal_width

_LEAST_BESIDE = 64
"""Columns needed beside a key's name; in a narrower terminal they are printed below it.
They hold its default, type and meaning."""


def run(arguments: Arguments) -> int:
    """Print groups, options or keys."""
    words = take_plugins(arguments.groups)
    known = groups(arguments.config_dir)
    width = terminal_width()
    if not words:
        print("\n".join(_overview(known, width)))
    for word in words:
        group, _, option = word.partition("/")
        if group not in (*known, "run"):
            parent = group.partition(".")[0]
            fix = f"launch list {parent} shows its keys" if parent in known else did_you_mean(group, [*known, "run"])
            raise ConfigError(word, why="no such group", fix=fix)
        if option and option not in known.get(group, []):
            raise ConfigError(word, why="no such option", fix=did_you_mean(option, known.get(group, [])))
        folders = option_folders(arguments.config_dir)[::-1]
        lines = _one(group, option, folders, width) if option else _all(group, known, folders, width)
        print("\n".join(lines))
    return 0


def _overview(known: dict[str, list[str]], width: int) -> Iterator[str]:
    yield from format_table([(group, ", ".join(options)) for group, options in known.items()], width=width)
    for plugin in loaded_plugins():
        yield from textwrap.wrap(f"{plugin.origin} ({plugin.file}): {_added(plugin)}", width, break_long_words=False)
    yield ""
    yield "launch list GROUP explains one; launch list GROUP/OPTION shows its values"


def _all(group: str, known: dict[str, list[str]], folders: Sequence[Path], width: int) -> Iterator[str]:
    rows = [(option, _summary(_file(group, option, folders))) for option in known.get(group, [])]
    yield from format_table(rows, width=width)
    kinds = KINDS.get(group, {})
    classes: list[type] = [RunOptions] if group == "run" else [component_class(group, kind) for kind in kinds]
    for number, cls in enumerate(classes):
        if rows or number:
            yield ""
        kind = f"kind {cls.kind}: " if issubclass(cls, Component) and len(classes) > 1 else ""
        origin = origin_of(group, cls.kind) if issubclass(cls, Component) else ""
        title = f"{kind}{class_title(cls)}{f' ({origin})' if origin else ''}"
        yield from textwrap.wrap(title, width, break_long_words=False)
        yield from _keys(group, cls, {name: value_text(value) for name, value in defaults(cls).items()}, width)


def _one(group: str, option: str, folders: Sequence[Path], width: int) -> Iterator[str]:
    file = _file(group, option, folders)
    yield from textwrap.wrap(f"{group}/{option}: {first_comment(file)}", width, break_long_words=False)
    given: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if given.get("kind") not in KINDS.get(group, {}) or "defaults" in given:  # exp, sweep, or built on other options
        yield file.read_text(encoding="utf-8").rstrip()
        return
    cls = component_class(group, given.pop("kind"))
    shown = {name: value_text(value) for name, value in defaults(cls).items()}
    shown |= {name: f"{value_text(value)} *" for name, value in given.items()}
    yield from _keys(group, cls, shown, width)
    yield "* set by this option; everything else is a default"


def _keys(group: str, cls: type, values: dict[str, str], width: int) -> Iterator[str]:
    docs, types = field_docs(cls), field_types(cls)
    rows = [(f"{group}.{name}", values.get(name, "needed"), describe_type(types[name]), docs[name]) for name in types]
    if max((len(row[0]) for row in rows), default=0) > width - _LEAST_BESIDE:
        for name, value, kind, meaning in rows:
            for text, indent in ((f"{name}: {value} ({kind})", "  "), (meaning, "    ")):
                yield from textwrap.wrap(
                    text, width, initial_indent=indent, subsequent_indent=" " * 4, break_long_words=False
                )
        return
    yield from format_table(rows, indent="  ", width=width, whole=(0,))


def _file(group: str, option: str, folders: Sequence[Path]) -> Path:
    return next(file for folder in folders if (file := folder / group / f"{option}.yaml").is_file())


def _added(plugin: LoadedPlugin) -> str:
    """Return what a plugin adds: groups with their kinds, then its options of YAML."""
    kinds = {**plugin.plugin.executors, **plugin.plugin.options}
    added = [f"{group} {' '.join(names)}" for group, names in kinds.items()]
    if plugin.conf is not None:
        added += [f"{group}={option}" for group, options in options_in(plugin.conf).items() for option in options]
    return ", ".join(added)


def _summary(file: Path) -> str:
    """Return the first comment of an option's file, and which plugin it is from."""
    plugin = next((each for each in loaded_plugins() if each.conf is not None and each.conf in file.parents), None)
    return first_comment(file) if plugin is None else f"{first_comment(file)} ({plugin.origin})".lstrip()


def first_comment(file: Path) -> str:
    """Return the first comment of a YAML file that is not a directive of Hydra's."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").rstrip()
    return ""
