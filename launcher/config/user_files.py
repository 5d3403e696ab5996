"""Checks of a user's options and experiments (``--config-dir``), before Hydra reads them."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.config.option_text import INTERPOLATION, interpolates
from launcher.config.overrides import Override, types_of_option
from launcher.config.registry import KINDS
from launcher.errors import ConfigError
from launcher.utils.files import exists, read_named
from launcher.utils.text import did_you_mean

_GLOBAL = "# @package _global_"
_DEFAULT = re.compile(
    r"(optional +)?(?P<override>override +)?(?P<slash>/?)(?P<group>[A-Za-z_]\w*)(?P<package>(@[\w.:]*)?)"
)
"""The key of an entry in the defaults of a file."""
_TEXT, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))
_YAML_TYPES = {
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
    "null": "nothing",
    "timestamp": "a date",
}


def validate_user_files(
    overrides: Sequence[Override], config_dir: Path | None, groups: Mapping[str, Sequence[str]]
) -> Iterator[ConfigError]:
    """Yield errors of the user's files for which Hydra's message names no file or no option.

    Args:
        overrides: those that may choose such files.
        config_dir: the folder of the user's options; ``None`` where there is none.
        groups: the options of every group.
    """
    if config_dir is None:
        return
    chosen = [(each.key, each.word.partition("=")[2].strip("'")) for each in overrides if each.is_group]
    seen: set[Path] = set()
    while chosen:
        group, option = chosen.pop(0)
        file = config_dir / group / f"{option}.yaml"
        if file in seen or not exists(file):
            continue
        seen.add(file)
        try:
            raw = read_named(file)
            tree = yaml.safe_load(raw.decode())
        except OSError as error:
            why, fix = f"{file} cannot be read: {error.strerror}", "check its permissions"
        except UnicodeDecodeError as error:
            why = f"{file} is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}"
            fix = "save it as UTF-8 (iconv -f latin1 -t utf-8 converts)"
        except RecursionError:
            why, fix = f"{file} is nested too deeply", "remove brackets"
        except yaml.MarkedYAMLError as error:
            mark, cause = error.problem_mark, error.problem or "is not YAML"
            line = mark.line + 1 if mark is not None else 1
            why, fix = f"line {line} of {file} is not YAML: {cause}", "correct the line"
            fix = "indent with spaces" if "\\t" in cause else fix
        except yaml.YAMLError as error:
            why, fix = f"{file} is not YAML: {str(error).splitlines()[0]}", "save it as plain text"
        else:
            if raw.startswith(codecs.BOM_UTF8):
                why, fix = (
                    f"{file} begins with a byte order mark",
                    f"remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' {file}",
                )
            elif tree is not None and not isinstance(tree, dict):
                why, fix = f"{file} holds no options, each `name: value`", "launch list exp/ddp_gpt2 shows such a file"
            elif group == "exp" and not _is_global(raw):
                yield _missing_package(file)
                continue
            elif not isinstance((tree or {}).get("defaults", []), list):
                why, fix = (
                    f"{file}: defaults is not a list",
                    "write `- override /model: gpt2` below it, a line for each",
                )
            else:
                root = yaml.compose(raw.decode(), Loader=yaml.SafeLoader)
                yield from _unusable_keys(root, "" if group == "exp" else f"{group}.", file)
                yield from _unusable_options(tree or {}, "", file)
                if group == "exp":
                    yield from _unusable_defaults(root, raw.decode(), file, groups)
                    chosen += _chosen_by(tree or {})
                continue
        yield ConfigError(group, option, why=why, fix=fix)


def _unusable_keys(root: yaml.Node | None, package: str, file: Path) -> Iterator[ConfigError]:
    """Yield the keys of a file that are not text, and those that a mapping holds twice.

    Args:
        root: of the file.
        package: the group of its options with a dot; empty where it names groups itself.
        file: for messages.
    """
    seen: set[int] = set()  # an alias may lead back to a node
    nodes = [(package, root)]
    while nodes:
        path, node = nodes.pop(0)
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:
            continue
        seen.add(id(node))
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            option, line = f"{path}{key.value}", key.start_mark.line + 1
            source = f"{file}:{line}"
            if key.tag != _TEXT:
                why = f"is {_yaml_type(key)} in YAML, not the name of an option"
                fix = f'write a name before the colon, or "{key.value}" in quotes for this text'
                yield ConfigError(option, why=why, fix=fix, source=source)
            elif key.value in lines:
                why = f"is already set in line {lines[key.value]}, and a mapping has each name once"
                yield ConfigError(option, why=why, fix="remove one of them, or merge their contents", source=source)
            lines.setdefault(key.value, line)
            nodes.append((f"{option}.", value))


def _yaml_type(node: yaml.Node) -> str:
    """Return the type that YAML reads in place of text."""
    return _YAML_TYPES.get(node.tag.rpartition(":")[2], "no text")


def _unusable_options(tree: Mapping[Any, Any], path: str, file: Path) -> Iterator[ConfigError]:
    for key, value in tree.items():
        option = f"{path}{key}"
        if not isinstance(key, str):
            continue  # _unusable_keys reports it
        if not path and key == "hydra":
            why, fix = "has no effect here", "use run.root, run.name and run.dir, or -m for sweeps"
            yield ConfigError(option, why=why, fix=fix, source=str(file))
        elif not path and "." in key and types_of_option(key):
            group, _, name = key.partition(".")
            why, fix = "is written with a dot, which YAML does not split", f"write {group}: {{{name}: …}}"
            yield ConfigError(option, why=why, fix=fix, source=str(file))
        elif isinstance(value, dict):
            yield from _unusable_options(value, f"{option}.", file)
        elif isinstance(value, str) and INTERPOLATION in value and not interpolates(value):
            why, fix = "holds ${ without the name and } of a variable", "close it, or write \\${ for the text itself"
            yield ConfigError(option, value, why=why, fix=fix, source=str(file))


def _chosen_by(tree: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """Yield group and option of each file that the defaults of an experiment name."""
    for entry in tree.get("defaults", []):
        if isinstance(entry, str):
            yield "exp", entry
        for key, option in entry.items() if isinstance(entry, dict) else ():
            found = _DEFAULT.fullmatch(str(key))
            if found is not None and isinstance(option, str):
                yield found["group"], option


def _unusable_defaults(
    root: yaml.Node | None, text: str, file: Path, groups: Mapping[str, Sequence[str]]
) -> Iterator[ConfigError]:
    """Yield the lines of an experiment's defaults that Hydra reads differently, each corrected.

    Hydra looks for a group without a slash below ``exp``, and takes one that the program chooses already only with
    ``override``.
    """
    lines = text.splitlines()
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    entries = [value for key, value in pairs if key.value == "defaults" and isinstance(value, yaml.SequenceNode)]
    for entry in itertools.chain.from_iterable(node.value for node in entries):
        if malformed := _malformed_default(entry):
            line = min(entry.start_mark.line, len(lines) - 1) + 1
            why = f"`{lines[line - 1].strip()}` (line {line} of {file}) {malformed[0]}"
            yield ConfigError("exp", file.stem, why=why, fix=malformed[1])
            continue
        words = [(key.value, value.value) for key, value in entry.value] if isinstance(entry, yaml.MappingNode) else []
        if isinstance(entry, yaml.ScalarNode):
            words = [tuple(entry.value.partition("=")[::2])]
        for key, option in words:
            found = _DEFAULT.fullmatch(str(key))
            if found is not None and (unknown := _unknown_default(found, option, file, groups)):
                line = entry.start_mark.line + 1
                why = f"`{lines[line - 1].strip()}` (line {line} of {file}) {unknown[0]}"
                yield ConfigError("exp", file.stem, why=why, fix=unknown[1])
                continue
            if found is None or found["group"] not in groups or not option or not isinstance(option, str):
                continue
            is_exp, is_added = found["group"] == "exp", found["group"] not in KINDS
            is_pair = isinstance(entry, yaml.MappingNode)
            is_right = is_pair and found["slash"] and bool(found["override"]) != is_added and not is_exp
            read_as = _yaml_type(entry.value[0][1]) if is_pair and entry.value[0][1].tag not in (_TEXT, _NULL) else ""
            if is_exp and option == file.stem:
                continue  # composing says that it is in its own defaults
            if (is_right and not read_as) or (
                not found["slash"] and exists(file.parent / found["group"] / f"{option}.yaml")
            ):
                continue
            quote = '"' if read_as or option.lower() in ("true", "false") else ""
            right = f"- {'' if is_added else 'override '}/{found['group']}{found['package']}: {quote}{option}{quote}"
            right = f"- {option}" if is_exp else right
            line = entry.start_mark.line + 1
            written = lines[line - 1].strip()
            if is_exp:
                cause = "names the group exp, which this file itself belongs to"
            elif not is_pair:
                cause = "is not written as GROUP: OPTION"
            elif not found["slash"]:
                cause = "has no slash before the group, so it is looked up below exp"
            elif is_right:
                cause = f"has {read_as} in YAML for its option"
            else:
                cause = "lacks `override`" if not is_added else "has `override`, which is for groups with a default"
            why = f"`{written}` (line {line} of {file}) {cause}"
            yield ConfigError("exp", file.stem, why=why, fix=f"write `{right}`")


def _malformed_default(entry: yaml.Node) -> tuple[str, str] | None:
    """Return why a defaults entry is neither a name nor a group: option, and what to write."""
    usual = "write `- override /GROUP: OPTION`, or the name of an experiment"
    if isinstance(entry, yaml.ScalarNode):
        return None if entry.tag == _TEXT else (f"is {_yaml_type(entry)} in YAML, not a name", usual)
    if not isinstance(entry, yaml.MappingNode):
        return "is a list, not a group and its option", usual
    if len(entry.value) != 1:
        return "holds several groups in one entry, or none", "begin each with a dash, on a line of its own"
    ((key, option),) = entry.value
    if key.tag != _TEXT:
        return f"begins with what is {_yaml_type(key)} in YAML, not with a group", usual
    if not isinstance(option, yaml.ScalarNode):
        return "names no option: a group takes one", f"write `- {key.value}: OPTION`"
    return None


def _unknown_default(
    found: re.Match[str], option: object, file: Path, groups: Mapping[str, Sequence[str]]
) -> tuple[str, str] | None:
    """Return why an entry of the defaults names nothing, with a correction; ``None`` if it does."""
    group = found["group"]
    if found["slash"] and group not in groups:
        return f"names no group {group}", did_you_mean(group, groups)
    is_choice = bool(found["slash"] or found["override"]) and group in groups
    if is_choice and isinstance(option, str) and option and "${" not in option:
        known = groups[group]
        return (
            None
            if {option, option.lower()} & set(known)
            else (f"names no option of the group {group}", did_you_mean(option, known))
        )
    is_name = not option and not (found["slash"] or found["override"]) and group not in (*groups, "_self_")
    if is_name and group not in groups["exp"]:
        return f"names no experiment {group}", did_you_mean(group, groups["exp"])
    return None


def unread_options(below_exp: Any) -> Iterator[ConfigError]:
    """Yield what was set below ``exp``, where nothing reads it."""
    is_mapping = isinstance(below_exp, dict)
    options = {f"exp.{name}": value for name, value in below_exp.items()} if is_mapping else {"exp": below_exp}
    for option, value in options.items():
        why, fix = "exp chooses experiments and has no options of its own", "remove it, or add +exp=NAME to the command"
        yield ConfigError(option, value, why=why, fix=fix)


def _missing_package(file: Path) -> ConfigError:
    why = f"{file} does not begin with the line `{_GLOBAL}`, so its options set nothing"
    return ConfigError("exp", file.stem, why=why, fix=f"put `{_GLOBAL}` into the first line of {file}")


def _is_global(raw: bytes) -> bool:
    """Whether the comments at the top of a file put its options where they are read."""
    header = itertools.takewhile(lambda line: not line.strip() or line.lstrip().startswith(b"#"), raw.splitlines())
    return any(b"".join(line.split()) == b"#@package_global_" for line in header)
