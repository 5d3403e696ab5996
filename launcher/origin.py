"""Where a value came from: the command line, or a file and line of ``conf/``. Only asked when something is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from launcher.overrides import COMMAND_LINE, Override


def find_origin(option: str, overrides: Sequence[Override], sources: Iterable[tuple[str, Path]]) -> str | None:
    """Return who set ``option`` last.

    Args:
        option: dotted, as in errors (``job.steps``; list positions are ignored).
        overrides: what the command line said.
        sources: (package, file) of every composed YAML, in the order in which later ones win.
    """
    keys = option.partition("[")[0].split(".")
    for override in overrides:
        if not override.is_group and override.key.split(".") == keys[: override.key.count(".") + 1]:
            return COMMAND_LINE
    found = None
    for package, file in sources:
        prefix = package.split(".") if package else []
        if keys[: len(prefix)] == prefix and (line := _line_of(file, keys[len(prefix) :])):
            found = f"{'/'.join(file.parts[-3:])}:{line}"
    return found


def written_in(option: str, sources: Iterable[tuple[str, Path]]) -> str | list[str] | None:
    """Return the text that stands for a scalar, or for each scalar of a list, in the YAML that sets ``option`` last.

    YAML reads ``007`` as 7 and ``1e5`` as 100000.0; this is what the user wrote.

    Args:
        option: dotted.
        sources: as of ``find_origin``.
    """
    keys, found = option.split("."), None
    for package, file in sources:
        prefix = package.split(".") if package else []
        if keys[: len(prefix)] == prefix:
            found = _find(file, keys[len(prefix) :])[1] or found
    if isinstance(found, yaml.ScalarNode):
        return str(found.value)
    if isinstance(found, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in found.value):
        return [str(item.value) for item in found.value]
    return None


def _line_of(file: Path, keys: Sequence[str]) -> int | None:
    """Return the 1-based line on which ``keys`` is set in a YAML file, if it is."""
    return _find(file, keys)[0]


def _find(file: Path, keys: Sequence[str]) -> tuple[int | None, yaml.Node | None]:
    """Return the 1-based line on which ``keys`` is set in a YAML file and its value, if it is."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = None
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            return None, None
        for name, value in node.value:
            if name.value == key:
                node, line = value, name.start_mark.line + 1
                break
        else:
            return None, None
    return line, node
