"""Override words of the command line: Hydra's grammar, checked before Hydra sees them."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Union

from launcher.config.option_text import INTERPOLATION, interpolates, quoted_text, quoted_word
from launcher.config.registry import KINDS, component_class
from launcher.config.run import RunOptions
from launcher.errors import ConfigError
from launcher.utils.schema import ReportError, field_types
from launcher.utils.text import did_you_mean, shell_word

COMMAND_LINE = "command line"
"""Source of a value, in errors."""
SEARCH_PATH = "hydra.searchpath"
"""Hydra's own option for more folders of options: the only one of Hydra's that is accepted."""

ADDED_GROUPS = ("exp", "sweep")
"""Groups not in the defaults list: Hydra requires ``+`` before them, the launcher does not."""

_OPTION = re.compile(r"\+{0,2}[A-Za-z_][\w/-]*(\.[\w/-]+)*(@[\w.:]*)?|~.+", re.ASCII)
"""Text before ``=``; ``~`` removes an option."""
_WITH_COMMAS = ("backend.include", "backend.exclude", "backend.nodelist")
"""Options whose text is a list of hosts or slots, with commas of its own, even in a sweep."""
_ALIASES = {
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float": "fp32",
    "tp": "tensor",
    "pp": "pipeline",
    "sp": "sequence",
    "dp": "ddp",
    "deepspeed": "zero3",
    "k8s": "kubernetes",
    "infer": "generate",
    "inference": "generate",
    "yes": "true",
    "on": "true",
    "1": "true",
    "no": "false",
    "off": "false",
    "0": "false",
    "flash_attention_2": "flash",
    "adam": "adamw",
}
"""Names of other programs for options of groups, in suggestions."""
_OPENING, _CLOSING = "[{(", "]})"
_KEY = re.compile(r"[A-Za-z_][\w.*/@?|%+-]*( [\w.*/@?|%+-]+)*", re.ASCII)
"""Name in a mapping, as Hydra's grammar takes it; Hydra takes none in quotes."""
_QUOTED_KEY = re.compile(r"""\s*(?P<quote>["'])(?P<name>.*?)(?P=quote)\s*:(?P<value>.*)""", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Override:
    """One accepted word."""

    key: str
    """Group or dotted option, without ``+``."""
    word: str
    """The word for Hydra."""
    typed: str = ""
    """The value as the user typed it."""
    value: Any = None
    """The value as plain data, of an option that has one."""
    is_group: bool
    choices: tuple[str, ...] | None = None
    """The values of a sweep (``job.seed=1,2,3``), as words that parse again; else ``None``."""


def parse_overrides(
    words: Sequence[str], groups: Mapping[str, Sequence[str]], *, sweeping: bool, report: ReportError
) -> list[Override]:
    """Return the words that make sense; report each of the others.

    Args:
        words: what the user typed.
        groups: the options of every config group; none for the changes of a saved run.
        sweeping: whether several values for one option are wanted (``-m`` or a sweep).
        report: called once per mistake.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, accepted = OverridesParser.create(), []
    for word in words:
        if problem := _undecodable(word):
            report(problem)
            continue
        if not _OPTION.fullmatch(word.partition("=")[0]) or not (word.startswith("~") or "=" in word):
            report(_not_an_override(word, groups))
            continue
        read = _as_typed(word)
        try:
            parsed = parser.parse_override(read)
        except HydraException:
            read = _literal(word)
            try:
                parsed = parser.parse_override(read)
            except HydraException:
                report(_unparsable(word))
                continue
            if problem := _unwritable_name(word):
                report(problem)
                continue
        if problem := _named_twice(word):
            report(problem)
            continue
        override = _classify(word, read, parsed, groups, sweeping=sweeping, report=report)
        if override is not None:
            accepted.append(override)
    for group in ADDED_GROUPS:  # Hydra takes one option of each, and its message does not say what to do
        given = [each for each in accepted if each.key == group]
        for other in given[1:]:
            accepted.remove(other)
            first, second = (each.word.partition("=")[2].strip("'") for each in (given[0], other))
            why = f"{group}={first} is already given, and only one can be used"
            fix = "leave one out, or name it in the defaults of the other"
            report(ConfigError(group, second, why=why, fix=fix, source=COMMAND_LINE))
    return accepted


def _undecodable(word: str) -> ConfigError | None:
    try:
        word.encode()
    except UnicodeEncodeError:
        shown = word.encode("utf-8", "backslashreplace").decode()
        fix = "rename the file, or make a link to it with a name in UTF-8"
        return ConfigError(shown, why="contains bytes that are not UTF-8, which run.yaml cannot store", fix=fix)
    return None


def _not_an_override(word: str, groups: Mapping[str, Sequence[str]]) -> ConfigError:
    meant = suggest_overrides(word, groups)
    fix = f"write {' or '.join(meant)}" if meant else "write it as option=value"
    return ConfigError(word or "''", why="is not an override of the form option=value", fix=fix)


def _unparsable(word: str) -> ConfigError:
    head, equals, value = word.partition("=")
    if not equals:
        return ConfigError(word, why="is not an override of the form option=value", fix="write it as option=value")
    why = "its quotes and brackets do not match in Hydra's grammar"
    fix = "put a value that holds quotes between quotes of the other kind, or write \\' for a quote inside quotes"
    return ConfigError(head.lstrip("+~"), value, why=why, fix=fix, source=COMMAND_LINE)


def _named_twice(word: str) -> ConfigError | None:
    """Return the error of a mapping that has a name twice: Hydra takes the last silently."""
    head, _, value = word.partition("=")
    if not _is_mapping(value):
        return None
    names = [each.partition(":")[0].strip().strip("'\"") for each in _split(value.strip()[1:-1])]
    twice = next((name for name in names if names.count(name) > 1 and re.fullmatch(r"[\w.-]+", name)), None)
    if twice is None:
        return None
    why, fix = f"has the name {twice} twice", "keep one of them, or choose another name"
    return ConfigError(head.lstrip("+"), value, why=why, fix=fix, source=COMMAND_LINE)


def suggest_overrides(word: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the overrides probably meant by a word without ``=``: ``model=gpt2`` for ``gpt2``."""
    head, equals, value = word.partition("=")
    if equals:
        key = re.sub(r"[.\s]+", ".", head).strip(".")
        return [shell_word(f"{key}={value}")] if types_of_option(key) or key in groups else []
    name = word.lstrip("+~-")
    if name in groups:
        return [f"{name}=<option>"]
    chosen = [f"{'' if group in KINDS else '+'}{group}={name}" for group in groups if name in groups[group]]
    if chosen:
        return chosen[:3]
    if types_of_option(name):
        return [f"{name}=<value>"]
    for separator in (":", "/", "."):
        key, _, value = name.partition(separator)
        if value in groups.get(key, ()) or (value and types_of_option(key)):
            return [shell_word(f"{key}={value}")]
    return []


def _as_typed(word: str) -> str:
    """Return ``word``, its value quoted for Hydra if the option takes text."""
    head, equals, value = word.partition("=")
    key, types_of = head.lstrip("+"), types_of_option(head.lstrip("+"))
    if not equals:
        return word
    if _is_quoted(value):
        inner = value.strip()[1:-1]
        return f"{head}={quoted_text(inner)}" if INTERPOLATION in inner and not interpolates(inner) else word
    if takes_only_text(types_of):
        is_null = value.strip().lower() == "null" and type(None) in types_of
        several = "," in value and key not in _WITH_COMMAS
        if not is_null and not several and not _is_call(value) and not (_is_list(value) or _is_mapping(value)):
            return f"{head}={quoted_text(value)}"
        return word
    if _takes_mapping_of_texts(types_of) and _is_mapping(value) and (mapping := _mapping(value)):
        return f"{head}={mapping}"
    if takes_texts(types_of) and _is_list(value) and not _is_several(value):
        return f"{head}=[{','.join(_element(each) for each in _split(value.strip()[1:-1]))}]"
    return word


def _literal(word: str) -> str:
    """Return ``word`` with its value as text, or as elements that are text."""
    head, _, value = word.partition("=")
    types_of = types_of_option(head.lstrip("+"))
    if _is_mapping(value) and not takes_only_text(types_of) and (mapping := _mapping(value)):
        return f"{head}={mapping}"
    if _is_list(value) and takes_texts(types_of):
        return f"{head}=[{','.join(_element(each) for each in _split(value.strip()[1:-1]))}]"
    if len(pieces := _split(value)) > 1 and head.lstrip("+") not in _WITH_COMMAS:
        return f"{head}={','.join(_element(each) for each in pieces)}"
    return f"{head}={quoted_text(value)}"


def _mapping(value: str) -> str | None:
    """Return a mapping for Hydra, values as text; ``None`` if Hydra rejects a name in it."""
    pairs = _pairs(value)
    texts = [f"{name}:{_element(text)}" for name, text in pairs if _KEY.fullmatch(name) and text is not None]
    return f"{{{','.join(texts)}}}" if len(texts) == len(pairs) else None


def _pairs(value: str) -> list[tuple[str, str | None]]:
    """Return names, without quotes, and values of a mapping; ``None`` where there is no colon."""
    found: list[tuple[str, str | None]] = []
    for each in _split(value.strip()[1:-1]):
        quoted = _QUOTED_KEY.fullmatch(each)
        name, colon, text = each.partition(":") if quoted is None else (quoted["name"], ":", quoted["value"])
        found.append((name.strip(), text.strip() if colon else None))
    return found


def _unwritable_name(word: str) -> ConfigError | None:
    """Return the error of a mapping that Hydra rejects for one of its names."""
    head, _, value = word.partition("=")
    option = head.lstrip("+")
    if not (_is_mapping(value) and any(typing.get_origin(hint) is dict for hint in types_of_option(option))):
        return None
    name = next((name for name, text in _pairs(value) if text is not None and not _KEY.fullmatch(name)), None)
    if name is None:
        return None
    why = f"has the name {name or repr(name)}, which a mapping in a word cannot have"
    fix = "begin it with a letter, or write the mapping into a file of options: conf/exp/NAME.yaml"
    return ConfigError(option, value, why=why, fix=fix, source=COMMAND_LINE)


def _element(text: str) -> str:
    """Return one element of a list, mapping or sweep for Hydra, as text unless quoted or nested."""
    stripped = text.strip()
    if _is_quoted(stripped) or _is_list(stripped) or _is_mapping(stripped):
        return stripped
    return quoted_text(stripped)


def _split(text: str) -> list[str]:
    """Split ``text`` at commas outside of brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not pieces[-1].strip():
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        if character == "," and not quote and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces if any(piece.strip() for piece in pieces) else []


def _is_several(value: str) -> bool:
    return len(_split(value)) > 1


def _is_quoted(value: str) -> bool:
    text = value.strip()
    return len(text) > 1 and text[0] in "'\"" and text[-1] == text[0] and not _is_several(value)


def _is_list(value: str) -> bool:
    text = value.strip()
    return text.startswith("[") and text.endswith("]") and text.count("[") == text.count("]")


def _is_mapping(value: str) -> bool:
    text = value.strip()
    return text.startswith("{") and text.endswith("}") and text.count("{") == text.count("}")


def _is_call(value: str) -> bool:
    """Whether it is one of Hydra's functions that give several values."""
    return re.fullmatch(r"(choice|range|glob|sort|shuffle|tag|interval|extend_list)\(.*\)", value.strip()) is not None


def types_of_option(key: str, *, kind: str | None = None) -> tuple[Any, ...]:
    """Return every type of the option ``key`` in its group's classes; none if it is unknown.

    Args:
        key: dotted.
        kind: of the class, where it is known; else all of them count.
    """
    group, _, rest = key.partition(".")
    kinds = KINDS.get(group, {}) if rest else {}
    classes = [component_class(group, each) for each in kinds if kind in (None, each)]
    wanted = [RunOptions] if group == "run" else classes
    return tuple(dict.fromkeys(found for cls in wanted for found in _types_in(cls, rest.split("."))))


def _types_in(hint: Any, keys: Sequence[str]) -> Iterator[Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for choice in arguments:
            yield from _types_in(choice, keys)
    elif not keys:
        yield hint
    elif is_dataclass(hint):
        fields: dict[str, Any] = field_types(typing.cast("Any", hint))
        if keys[0] in fields:
            yield from _types_in(fields[keys[0]], keys[1:])
    elif origin is dict:
        yield from _types_in(arguments[1], ())


def takes_only_text(types_of: Sequence[Any]) -> bool:
    """Whether text is the only scalar that an option takes."""
    return str in types_of and not {int, float, bool, Any} & set(types_of)


def takes_texts(types_of: Sequence[Any]) -> bool:
    """Whether an option takes a list of texts."""
    lists = [hint for hint in types_of if typing.get_origin(hint) is tuple]
    return any(str in typing.get_args(hint) for hint in lists)


def _takes_mapping_of_texts(types_of: Sequence[Any]) -> bool:
    return any(typing.get_origin(hint) is dict and typing.get_args(hint)[1] is str for hint in types_of)


def _classify(
    word: str, read: str, parsed: Any, groups: Mapping[str, Sequence[str]], *, sweeping: bool, report: ReportError
) -> Override | None:
    key = parsed.key_or_group
    if parsed.is_delete():
        report(ConfigError(word, why="removes an option, and every option is required", fix=f"set {key}=<value>"))
        return None
    if parsed.package is not None:
        fix = f"write {key}={word.partition('=')[2]}"
        report(
            ConfigError(
                word.partition("=")[0], why="has a package after @, and the package of each group is fixed", fix=fix
            )
        )
        return None
    if key.startswith(("hydra.", "hydra/")) and key != SEARCH_PATH:
        report(ConfigError(key, why="has no effect here", fix="use run.root, run.name and run.dir, or -m for sweeps"))
        return None
    typed, types_of = word.partition("=")[2], types_of_option(key)
    if problem := _unlisted(key, parsed, typed, groups):
        report(problem)
        return None
    if parsed.is_sweep_override() and not sweeping:
        report(_several_values(key, typed, types_of, groups))
        return None
    choices = _choices(parsed, typed, types_of, groups.get(key, ()))
    if key.partition("@")[0] in groups:
        return _group_choice(key, typed, choices, groups, report)
    if key.endswith(".kind") or key == "kind":
        group = key.partition(".")[0]
        report(ConfigError(key, why="follows from the option chosen", fix=f"set {group}=<option>"))
        return None
    value = None if choices is not None else parsed.value()
    if isinstance(value, list | dict) and takes_only_text(types_of) and not (takes_texts(types_of)):
        kind = "a list" if isinstance(value, list) else "a mapping"
        fix = f"to give this text, quote it: {quoted_word(key, typed)}"
        why = f"is {kind} in Hydra's grammar, and this option takes text"
        report(ConfigError(key, typed, why=why, fix=fix, source=COMMAND_LINE))
        return None
    bare = read.lstrip("+")
    given = bare if key == SEARCH_PATH else f"++{bare}"
    return Override(key=key, word=given, typed=typed, value=value, is_group=False, choices=choices)


def _several_values(key: str, typed: str, types_of: Sequence[Any], groups: Mapping[str, Sequence[str]]) -> ConfigError:
    """Return the error of a sweep where a single value is needed, with every way to write it."""
    ways = ["add -m to run them all"] if groups else []  # a saved run has none, and is no grid
    if any(typing.get_origin(hint) is tuple for hint in types_of):
        ways.append(f"write {shell_word(f'{key}=[{typed}]')} for a list")
    if takes_only_text(types_of):
        ways.append(f"quote it if it is one text: {quoted_word(key, typed)}")
    if key.partition("@")[0] in groups:
        ways.append("choose one" if _is_call(typed) else f"choose one, {key}={_split(typed)[0].strip()}")
    fix = ", or ".join(ways) or "give one value: only launch sweep runs grids, as new runs"
    return ConfigError(key, typed, why="is several values in Hydra's grammar", fix=fix, source=COMMAND_LINE)


def _unlisted(key: str, parsed: Any, typed: str, groups: Mapping[str, Sequence[str]]) -> ConfigError | None:
    """Return why the values of a sweep cannot be listed; ``None`` where they can."""
    if parsed.is_interval_sweep():
        why, fix = "is an interval, not a list of values", "write them: a,b,c or range(START,STOP,STEP)"
    elif not _is_glob(parsed):
        return None
    elif key not in groups:
        why, fix = "is a pattern of a group's options, and this is not a group", "write the values: a,b,c"
    elif not parsed.value().filter(list(groups[key])):
        why, fix = "matches no option", did_you_mean(typed, groups[key])
    else:
        return None
    if takes_only_text(types_of_option(key)):
        fix = f"{fix}; or quote it if it is one text: {quoted_word(key, typed)}"
    return ConfigError(key, typed, why=why, fix=fix, source=COMMAND_LINE)


def _is_glob(parsed: Any) -> bool:
    from hydra.core.override_parser.types import Glob

    return isinstance(parsed.value(), Glob)


def _choices(parsed: Any, typed: str, types_of: Sequence[Any], options: Sequence[str]) -> tuple[str, ...] | None:
    if not parsed.is_sweep_override():
        return None
    if _is_glob(parsed):
        return tuple(parsed.value().filter(list(options)))
    if options and not _is_call(typed):
        return tuple(_unquoted(piece) for piece in _split(typed))
    if takes_only_text(types_of) and not _is_call(typed):  # Hydra would make 100000.0 of 1e5
        return tuple(piece.strip() for piece in _split(typed))
    return tuple(str(item) for item in parsed.sweep_string_iterator())


def _unquoted(text: str) -> str:
    """Return the name of an option without the quotes around it."""
    return text.strip()[1:-1] if _is_quoted(text) else text.strip()


_PLUGIN_GROUPS = ("job", "model", "data", "optimizer", "schedule", "benchmark", "tracker", "backend")
"""Groups to which plugins add options."""


def _group_choice(
    key: str, typed: str, choices: tuple[str, ...] | None, groups: Mapping[str, Sequence[str]], report: ReportError
) -> Override | None:
    options = groups[key]
    wanted = choices if choices is not None else (_unquoted(typed),)
    wanted = tuple(option.lower() if option in ("True", "False") else option for option in wanted)  # truth values
    unknown = [option for option in wanted if option not in options]
    for option in unknown:
        alias = _ALIASES.get(option.lower())
        fix = f"did you mean {alias}?" if alias in options else did_you_mean(option, options)
        if key in _PLUGIN_GROUPS and fix.startswith("choose from"):
            fix += "; name the module of a plugin that adds it: plugins=[MODULE]"
        report(ConfigError(key, option, why="no such option", fix=fix))
    if unknown:
        return None
    prefix = "" if key in KINDS else "+"
    quoted = ",".join(map(quoted_text, wanted))  # Hydra refuses compile=true as a boolean
    return Override(key=key, word=f"{prefix}{key}={quoted}", is_group=True, choices=choices)
