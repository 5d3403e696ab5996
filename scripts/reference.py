"""Write docs/reference/: every group, option and key from the config classes, every verb from the command line.

    python scripts/reference.py

A test compares the pages with what this would write.
"""

from __future__ import annotations

import html
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.cli.list import first_comment
from launcher.cli.parser import synopsis
from launcher.cli.verbs import LAUNCH, LAUNCH_EPILOG, VERBS, Verb
from launcher.config.component import class_title, field_docs
from launcher.config.folders import conf_folder, groups
from launcher.config.option_text import INTERPOLATION, value_text
from launcher.config.registry import KINDS, component_class
from launcher.config.run import RunOptions
from launcher.errors import ConfigError
from launcher.utils.schema import build, defaults, describe_type, field_types

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
GENERATED = "<!-- Written by scripts/reference.py: change the source of a text, then run it again. -->"
_TOO_LOW, _TOO_HIGH = -1, 1e9
"""Values that every limited number rejects; its error names the limit."""


def pages() -> dict[str, str]:
    """Return the text of every page by the name of its file."""
    return {
        "index.md": _page(_index()),
        **{f"{group}.md": _page(_group(group)) for group in (*KINDS, "run")},
        "experiments.md": _page(_experiments()),
        "commands.md": _page(_commands()),
    }


def _page(lines: Iterator[str]) -> str:
    return "\n".join([GENERATED, *lines]) + "\n"


def _index() -> Iterator[str]:
    chosen = _default_options()
    yield from ("# Reference", "", "Generated from the config classes and the command line; `launch list` prints the")
    yield from ("same texts. Choose an option with `GROUP=OPTION`, set a key with `GROUP.KEY=VALUE`.", "")
    rows = []
    for group in KINDS:
        options = " ".join(f"`{name}`" for name in groups().get(group, []))
        rows.append((f"[`{group}`]({group}.md)", options, f"`{chosen[group]}`" if group in chosen else ""))
    yield from _table(("group", "options", "default"), [*rows, ("[`run`](run.md)", "where a run is kept", "")])
    yield ""
    yield "[Experiments and sweeps](experiments.md) set several groups at once."
    yield "[Commands](commands.md) lists every verb."


def _group(group: str) -> Iterator[str]:
    yield f"# `{group}`"
    chosen = _default_options().get(group)
    if options := groups().get(group, []):
        yield from ("", f"Choose one with `{group}=OPTION`.", "")
        rows = []
        for name in options:
            sets = {key: value for key, value in _option(group, name).items() if key != "kind"}
            words = " ".join(_setting(key, value) for key, value in sets.items())
            mark = " (default)" if name == chosen else ""
            rows.append((f"`{name}`{mark}", _text(first_comment(_file(group, name))), words))
        yield from _table(("option", "meaning", "sets"), rows)
    kinds = KINDS.get(group, [""])  # the group run has one class and no kinds
    classes: dict[str, type] = {kind: component_class(group, kind) if kind else RunOptions for kind in kinds}
    rows_of = {kind: _keys(group, kind, cls) for kind, cls in classes.items()}
    shared = [row for row in next(iter(rows_of.values())) if all(row in rows for rows in rows_of.values())]
    header = ("key", "value", "default", "meaning")
    if shared and len(classes) > 1:
        yield from ("", f"## Keys of every `{group}`", "")
        yield from _table(header, shared)
    for kind, cls in classes.items():
        own = rows_of[kind] if len(classes) == 1 else [row for row in rows_of[kind] if row not in shared]
        if len(classes) > 1:
            yield from ("", f"## Kind `{kind}`")
        yield from ("", _text(class_title(cls)))
        if own:
            yield ""
            yield from _table(header, own)


def _setting(key: str, value: object) -> str:
    return f"`{key}` (needed)" if value == "???" else f"`{key}={value_text(value)}`"


def _keys(group: str, kind: str, cls: type) -> list[tuple[str, str, str, str]]:
    docs, usual = field_docs(cls, with_markup=True), defaults(cls)
    limits = _limits(group, kind, cls)
    rows = []
    for name, wanted in field_types(cls).items():
        value = "; ".join([describe_type(wanted), *limits.get(name, [])])
        default = f"`{value_text(usual[name])}`" if name in usual else "needed"
        rows.append((f"`{group}.{name}`", _text(value), "empty" if default == "``" else default, _text(docs[name])))
    return rows


def _limits(group: str, kind: str, cls: type) -> dict[str, list[str]]:
    """Return what the checks of a class demand of each number, as its errors say it (``must be at least 1``)."""
    found: dict[str, list[str]] = {}
    given = _values_of_kind(group, kind)
    for name, wanted in field_types(cls).items():
        kinds = {wanted, *typing.get_args(wanted)}
        for value in [_TOO_LOW] * bool(kinds & {int, float}) + [_TOO_HIGH] * (float in kinds):
            errors: list[ConfigError] = []
            build(cls, {**given, name: value}, path=group, report=errors.append)
            for error in errors:
                limit = error.why.removeprefix("must be ").removeprefix("must lie ")
                if error.option == f"{group}.{name}" and limit != error.why and limit not in found.get(name, []):
                    found.setdefault(name, []).append(limit)
    return found


def _values_of_kind(group: str, kind: str) -> dict[str, Any]:
    """Return the values that the first option of a kind sets, so that a class with needed fields can be built."""
    for name in groups().get(group, []):
        option = _option(group, name)
        if str(option.pop("kind", "")) == kind:
            return {key: value for key, value in option.items() if INTERPOLATION not in str(value)}
    return {}


def _file(group: str, option: str) -> Path:
    return conf_folder() / group / f"{option}.yaml"


def _option(group: str, name: str) -> dict[str, Any]:
    option: dict[str, Any] = yaml.safe_load(_file(group, name).read_text(encoding="utf-8")) or {}
    return option


def _default_options() -> dict[str, str]:
    config = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
    pairs = [pair for entry in config["defaults"] if isinstance(entry, Mapping) for pair in entry.items()]
    return {group: value_text(name) for group, name in pairs}


def _experiments() -> Iterator[str]:
    yield "# Experiments and sweeps"
    for group, words in (("exp", "An experiment sets several groups"), ("sweep", "A sweep is a grid of runs")):
        yield from ("", f"{words}: `launch +{group}=NAME`. `launch list {group}/NAME` prints its file.", "")
        rows = [(f"`+{group}={name}`", _text(first_comment(_file(group, name)))) for name in groups().get(group, [])]
        yield from _table((group, "meaning"), rows)


def _commands() -> Iterator[str]:
    yield from (
        "# Commands",
        "",
        "`launch` without a verb runs a configuration; `python -m launcher` is the same program.",
    )
    yield from ("", "## launch", *_verb("", LAUNCH))
    for name, verb in VERBS.items():
        yield from ("", f"## launch {name}", "", f"{_text(verb.summary[0].upper() + verb.summary[1:])}.")
        yield from _verb(name, verb)


def _verb(name: str, verb: Verb) -> Iterator[str]:
    yield from _block(synopsis(name, verb))
    rows = [(_code(one.metavar), _text(one.help)) for one in verb.positionals]
    shown = [one for one in verb.options if not one.is_hidden]
    rows += [(f"`{', '.join(one.names)}{f' {one.metavar}' * bool(one.metavar)}`", _text(one.help)) for one in shown]
    if verb.takes_version:
        rows.append(("`-V, --version`", "print the version"))
    yield ""
    yield from _table(("word", "meaning"), [*rows, ("`-h, --help`", "print the help text")])
    if verb.examples:
        yield from ("", "Examples:", *_block(textwrap.dedent(verb.examples)))
    if notes := verb.notes or (LAUNCH_EPILOG if verb is LAUNCH else ""):
        yield from _block(notes)


def _block(text: str) -> Iterator[str]:
    yield from ("", "```text", text.rstrip(), "```")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def _text(text: str) -> str:
    """Return a docstring or comment as a cell of a Markdown table: markup is kept in code alone."""
    parts = re.split(r"(``.+?``)", " ".join(text.split()))
    plain = (re.sub(r"([\\*<>|`])", r"\\\1", part) for part in parts[::2])
    code = [_code(part.strip("`")) for part in parts[1::2]]
    return "".join(word for pair in zip(plain, [*code, ""], strict=True) for word in pair)


def _code(text: str) -> str:
    """Return code in a cell of a table, where a bar would end the cell."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def main() -> None:
    """Write every page that has changed, and remove those of groups that are gone."""
    FOLDER.mkdir(exist_ok=True)
    wanted = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
