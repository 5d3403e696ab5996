"""Conversion of plain trees to frozen dataclasses and back, reporting every error at once."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Container, Mapping
from typing import Any, Literal, TypeVar, Union

from launcher.errors import ConfigError, ConfigErrors
from launcher.utils.text import did_you_mean, shell_word

T = TypeVar("T")
ReportError = Callable[[ConfigError], None]

NO_SUCH_OPTION = "no such option"
_INVALID = object()
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


@functools.cache
def field_types(cls: Any) -> dict[str, Any]:
    """Return the resolved type of each configurable field of ``cls``."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def defaults(cls: type) -> dict[str, Any]:
    """Return the default of every field that has one, as a plain tree."""
    tree = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            tree[field.name] = to_tree(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = to_tree(field.default_factory())
    return tree


OPTION_TYPES = "int, float, str, bool, Literal, tuple[T, ...], dict[str, T], a dataclass, or one of these or None"
"""Types that an option can have, as text for authors of plugins."""


def is_option_type(wanted: Any) -> bool:
    """Return whether :func:`convert` makes values of a type."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return all(map(is_option_type, arguments))
    if origin is tuple:
        return all(is_option_type(each) for each in arguments if each is not Ellipsis)
    if origin is dict:
        return arguments[0] is str and is_option_type(arguments[1])
    if dataclasses.is_dataclass(wanted):
        return all(map(is_option_type, field_types(wanted).values()))  # type: ignore[arg-type]
    return origin is Literal or wanted is Any or wanted in _WORDS


def build(cls: type[T], tree: Mapping[str, Any], *, path: str, report: ReportError) -> T | None:
    """Return ``cls`` built from ``tree``; every error is reported.

    Errors are unknown keys, missing values, wrong types and rejected values.

    Args:
        cls: a frozen dataclass.
        tree: plain dicts, lists and scalars.
        path: the option this tree sits at (``parallel``), for messages.
        report: called once per mistake.

    Returns:
        The instance, or ``None`` when anything was reported.
    """
    wanted: dict[str, Any] = field_types(cls)  # type: ignore[arg-type]
    values, sound = {}, True
    for key in tree:
        if key not in wanted:
            report(ConfigError(f"{path}.{key}".lstrip("."), why=NO_SUCH_OPTION, fix=did_you_mean(str(key), wanted)))
            sound = False
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        option = f"{path}.{field.name}".lstrip(".")
        value = tree.get(field.name, "???")
        if field.name not in tree and _has_default(field):
            continue
        if value == "???":
            report(ConfigError(option, why="has no value", fix=f"set {option}=<{describe_type(wanted[field.name])}>"))
            sound = False
            continue
        converted = convert(wanted[field.name], value, path=option, report=report)
        if converted is _INVALID:
            sound = False
        else:
            values[field.name] = converted
    if any(field.name not in values and not _has_default(field) for field in dataclasses.fields(cls)):  # type: ignore[arg-type]
        return None
    try:
        built = cls(**values)  # also when something was wrong already: the sound values are checked all the same
    except ConfigErrors as several:
        for error in several.errors:
            report(error)
        return None
    return built if sound else None


def convert(wanted: Any, value: Any, *, path: str, report: ReportError) -> Any:
    """Return ``value`` as the type ``wanted``; on a mismatch report it and return a marker."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(wanted, arguments, value, path=path, report=report)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        text = f"is not one of {', '.join(map(str, arguments))}"
        report(ConfigError(path, _shown(value), why=text, fix=did_you_mean(str(value), map(str, arguments))))
        return _INVALID
    if origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if Ellipsis in arguments else arguments
        if len(value) != len(kinds):
            return _mismatch(wanted, value, path, report)
        pairs = zip(kinds, value, strict=True)
        items = [convert(kind, entry, path=f"{path}[{i}]", report=report) for i, (kind, entry) in enumerate(pairs)]
        return _INVALID if any(entry is _INVALID for entry in items) else tuple(items)
    if origin is dict and isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                word = str(key).lower() if isinstance(key, bool) else key
                why = f"has the key {word}, which is {_kind_of(key)}"
                fix = f'write {path}.{word}=<value>, or "{word}" in YAML'
                report(ConfigError(path, _shown(value), why=why, fix=fix))
        if not all(isinstance(key, str) for key in value):
            return _INVALID
        items_of = {k: convert(arguments[1], v, path=f"{path}.{k}", report=report) for k, v in value.items()}
        return _INVALID if any(entry is _INVALID for entry in items_of.values()) else items_of
    if dataclasses.is_dataclass(wanted) and isinstance(value, Mapping):
        if value.get("kind", "") == getattr(wanted, "kind", None):  # to_tree writes it
            value = {key: part for key, part in value.items() if key != "kind"}
        built = build(wanted, value, path=path, report=report)  # type: ignore[arg-type]
        return _INVALID if built is None else built
    return _convert_scalar(wanted, value, path=path, report=report)


def _convert_scalar(wanted: Any, value: Any, *, path: str, report: ReportError) -> Any:
    is_bool = isinstance(value, bool)
    if wanted is float and not is_bool:
        number = _number(value)
        if number is not None:
            return number
    if wanted is int and not is_bool:
        number = _number(value)
        if number is not None and number == int(number) and not _is_too_large(value):  # 5e8 is a whole number
            return int(number)
    if wanted is str and isinstance(value, str | int | float) and not is_bool:
        return str(value)
    if wanted in (bool, type(None)) and isinstance(value, wanted):
        return value
    return _mismatch(wanted, value, path, report)


def _number(value: Any) -> float | None:
    """Return a finite number; text counts if it spells one, as YAML reads ``1e-4`` as text."""
    if not isinstance(value, int | float | str) or _is_infinite(value):
        return None
    if isinstance(value, int):
        return value
    try:
        return float(value)
    except ValueError:
        return None


def _convert_union(wanted: Any, arguments: tuple[Any, ...], value: Any, *, path: str, report: ReportError) -> Any:
    for exact in (True, False):  # text stays text in "str | int" when it is text
        for choice in arguments:
            if exact and not (isinstance(choice, type) and type(value) is choice):
                continue
            quiet: list[ConfigError] = []
            converted = convert(choice, value, path=path, report=quiet.append)
            if not quiet:
                return converted
    mappings = [choice for choice in arguments if dataclasses.is_dataclass(choice)]
    if isinstance(value, Mapping) and len(mappings) == 1:  # then the mistake is in one of its values
        return convert(mappings[0], value, path=path, report=report)
    return _mismatch(wanted, value, path, report)


def _is_too_large(value: Any) -> bool:
    """Return whether a whole number does not fit into 64 bits, the size in tensors and files."""
    number = value if isinstance(value, int) else _number(value)
    return number is not None and not -(2**63) <= number < 2**63


def _is_infinite(value: Any) -> bool:
    """Return whether this is, or spells, a number that is not finite or overflows a float."""
    try:
        return isinstance(value, int | float | str) and not math.isfinite(float(value))
    except OverflowError:  # of an int
        return True
    except ValueError:
        return False


def _takes(kinds: Container[type], wanted: Any) -> bool:
    return wanted in kinds or any(_takes(kinds, choice) for choice in typing.get_args(wanted))


def _mismatch(wanted: Any, value: Any, path: str, report: ReportError) -> Any:
    is_number = not isinstance(value, bool) and _takes((int, float), wanted)
    if is_number and _takes((int,), wanted) and _is_too_large(value):
        why, fix = "does not fit into 64 bits", f"give a number from {-(2**63)} to {2**63 - 1}"
        report(ConfigError(path, value, why=why, fix=fix))
        return _INVALID
    if is_number and _is_infinite(value):
        report(ConfigError(path, _shown(value), why="must be finite", fix=f"give {describe_type(wanted)}"))
        return _INVALID
    fix = f"give {describe_type(wanted)}{_how_to_write(wanted, value, path)}"
    why = f"is {_kind_of(value)}"
    if isinstance(value, list | tuple) and typing.get_origin(wanted) is tuple:
        why = f"is a list of {len(value)}"
    report(ConfigError(path, _shown(value), why=why, fix=fix))
    return _INVALID


def _how_to_write(wanted: Any, value: Any, path: str) -> str:
    """Return how to write a value of this type; empty if the type name says it."""
    if "[" in path:  # a part of a value, which no word sets
        return ""
    if isinstance(value, str) and any(typing.get_origin(one) is dict for one in (wanted, *typing.get_args(wanted))):
        return f": '{path}={{NAME: VALUE}}', a value that holds a comma in quotes"
    if _takes((str,), wanted) and (value is None or isinstance(value, bool)):
        return f": '{_shown(value)}' in quotes"
    lists = [one for one in (wanted, *typing.get_args(wanted)) if typing.get_origin(one) is tuple]
    is_list = any(Ellipsis in typing.get_args(one) for one in lists)  # one value is none of several that must be there
    if is_list and isinstance(value, str | int | float) and "," not in str(value):
        return f": {shell_word(f'{path}=[{value}]')}"
    return ""


def _kind_of(value: Any) -> str:
    return _WORDS.get(type(value), "a mapping" if isinstance(value, Mapping) else "a list")


def _shown(value: Any) -> Any:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def describe_type(wanted: Any) -> str:
    """Return a type as text for the user."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(choice) for choice in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        number = "" if Ellipsis in arguments else f"{len(arguments)} values, each "
        return f"a list of {number}{describe_type(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(wanted):
        return "a mapping"
    return _WORDS.get(wanted, "any value")


def to_tree(value: Any) -> Any:
    """Return ``value`` as plain dicts, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree = {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
        kind = getattr(type(value), "kind", None)
        return {"kind": kind, **tree} if kind else tree
    if isinstance(value, Mapping):
        return {key: to_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    return value
