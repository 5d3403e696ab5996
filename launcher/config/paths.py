"""Options that hold paths: ``~`` in them, and paths that this process cannot read.

``Path.exists`` and the like raise for some of these paths, return False for others; they differ by version of Python.
So every path of an option is looked at here once, before any other code does.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from launcher.errors import ConfigError
from launcher.utils.files import exists

_MARK = "path"
PathText = Annotated[str, _MARK]
"""The type of an option that holds a path, or may hold one instead of a word."""

_KEYWORDS = frozenset(
    {
        *("auto", "none", "random", "pretrained", "model", "data", "bytes", "bpe", "sample"),
        *("python-docs", "chat-tasks", "sample-preferences"),
    }
)
"""Keywords of options that otherwise take a path."""

_GLOB_CHARACTERS = frozenset("*?[")
_LONGEST_NAME, _LONGEST_PATH = 255, 4096


@functools.cache
def path_fields(cls: Any) -> frozenset[str]:
    """Return the names of the fields of a dataclass that hold paths."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return frozenset(field.name for field in fields(cls) if _is_marked(hints[field.name]))


def expand_home(value: Any) -> Any:
    """Return a path, or a list of paths, with ``~`` replaced as a shell would.

    What still begins with ``~`` names a user who does not exist: :func:`validate_home`. A file whose own name begins so
    gets its whole path, since ``Path.expanduser`` raises for it wherever it is called later.
    """
    if isinstance(value, list | tuple):
        return type(value)(map(expand_home, value))
    if isinstance(value, Mapping):
        return {name: expand_home(each) for name, each in value.items()}
    if not isinstance(value, str) or "~" not in value:
        return value
    expanded = os.path.expanduser(value)  # noqa: PTH111 (Path would raise for a user who does not exist)
    is_literal = os.path.lexists(expanded) if expanded.startswith("~") else str(Path(expanded)).startswith("~")
    return os.path.abspath(expanded) if is_literal else expanded  # noqa: PTH100 (links stay)


def validate_home(option: str, value: str) -> ConfigError | None:
    """Return why the ``~`` that a path begins with is not replaced; ``None`` where it has none.

    Args:
        option: by which the user named it.
        value: what :func:`expand_home` returned.
    """
    if not value.startswith("~"):
        return None
    user = value.partition("/")[0]
    if user == "~":
        why, fix = "this user has no home folder", "set HOME, or give an absolute path"
    else:
        why, fix = f"there is no user {user[1:]} here", f"give an absolute path, or ./{value} for a folder of that name"
    return ConfigError(option, value, why=why, fix=fix)


def homeless_paths(group: str, component: Any, *, is_here: bool) -> Iterator[ConfigError]:
    """Yield the error of every path of a component that begins with ``~`` and no home.

    Args:
        group: of the component.
        component: its options, expanded where they name paths of this machine.
        is_here: whether they do; elsewhere ``~`` is replaced by the machine that runs the job.
    """
    for option, value in named_paths(group, component):
        if is_here:
            problem = validate_home(option, value)
            yield from [problem] if problem else ()
        elif re.match(r"~[^/]", value):
            yield ConfigError(option, value, why="a pod has other users", fix="give the absolute path that pods use")


def named_paths(group: str, component: Any) -> Iterator[tuple[str, str]]:
    """Yield option and value of every path that a component of ``group`` names."""
    cls: Any = type(component)
    for name in sorted(path_fields(cls)):
        for option, each in _flattened(f"{group}.{name}", getattr(component, name)):
            if each not in _KEYWORDS:
                yield option, each


def _flattened(option: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield option and text of each path in a text, a list, or a mapping of names to either."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _flattened(f"{option}.{name}", each)
    elif isinstance(value, tuple):
        for each in value:
            yield from _flattened(option, each)
    elif isinstance(value, str):
        yield option, value


def anchored(component: Any, folder: Path) -> Any:
    """Return a component with its relative paths anchored at ``folder``, where they exist.

    What is at none may be a word of another kind: the name of a model on the hub.
    """
    cls: Any = type(component)
    values = {name: getattr(component, name) for name in path_fields(cls)}
    found = {name: _anchored(value, folder, is_new=name == "output") for name, value in values.items()}
    changed = {name: value for name, value in found.items() if value != values[name]}
    return replace(component, **changed) if changed else component


def _anchored(value: Any, folder: Path, *, is_new: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_anchored(each, folder, is_new=is_new) for each in value)
    if isinstance(value, Mapping):
        return {name: _anchored(each, folder, is_new=is_new) for name, each in value.items()}
    if not isinstance(value, str) or value in _KEYWORDS or value.startswith(("/", "~")) or not value.strip():
        return value
    whole = folder / value
    is_there = exists(whole.parent if is_new else _without_pattern(whole))
    return str(whole) if is_there else value


def validate_path(option: str, value: str) -> ConfigError | None:
    """Return why this process cannot read a path; ``None`` if it can, or if nothing is there.

    Args:
        option: by which the user named it.
        value: the path, or a pattern of paths.
    """
    if not value.strip():
        fix = f"set {option} to a path, or leave it out"
        return ConfigError(option, repr(value), why="is empty, not a path", fix=fix)
    fix = f"set {option} to another path"
    if "\0" in value:
        return ConfigError(option, repr(value), why="holds a NUL character, which no path can", fix=fix)
    expanded = expand_home(value)
    if problem := validate_home(option, expanded):
        return problem
    whole = Path(expanded)
    path = _without_pattern(whole)
    try:
        path.stat()
    except OSError as error:
        why = _reason(path, error)
        return None if why is None else ConfigError(option, value, why=why, fix=fix)
    if path != whole and not path.is_dir():
        return ConfigError(option, value, why=f"{path} is a file, not a folder", fix=fix)
    if not _is_ordinary(path):
        return ConfigError(option, value, why=f"{path} is neither a file nor a folder", fix=fix)
    if not _may(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        why = f"{path} cannot be read by this user (permission denied)"
        return ConfigError(option, value, why=why, fix=f"change its permissions, or {fix}")
    return None


def is_named_path(option: str, word: str) -> bool:
    """Return whether ``word``, which may be an id or a name instead, is a path that is there.

    Raises:
        ConfigError: it can only be a path, and cannot be looked at.
    """
    problem = validate_path(option, word) if word else None
    if problem is not None and ("/" in word or os.path.lexists(word)):
        raise problem
    return problem is None and exists(Path(expand_home(word)))


def _without_pattern(path: Path) -> Path:
    """Return the folder that a pattern begins with; a path without one as it is."""
    if not _GLOB_CHARACTERS & set(str(path)):
        return path
    for parent in (path, *path.parents):
        if not _GLOB_CHARACTERS & set(str(parent)):
            return parent
    return Path()


def _reason(path: Path, error: OSError) -> str | None:
    if error.errno == errno.ENOENT:
        link = next((each for each in (path, *path.parents) if os.path.islink(each)), None)  # noqa: PTH114 (never raises)
        first = next((each for each in (path, *path.parents) if os.path.lexists(each)), None)
        if link is not None and link == first:
            return f"{link} is a link to {link.readlink()}, which does not exist"
        return _too_long(path)  # the system answers so only where the folder of the long name is there
    if error.errno == errno.ENAMETOOLONG:
        return _too_long(path)
    if error.errno == errno.ENOTDIR:
        file = next(parent for parent in path.parents if exists(parent))
        return f"{file} is a file, not a folder"
    if error.errno == errno.ELOOP:
        return "it leads through a link that leads back to itself"
    if error.errno == errno.EACCES:
        closed = next((parent for parent in reversed(path.parents) if _is_closed(parent)), path.parent)
        return f"{closed} cannot be opened by this user (permission denied)"
    return f"it cannot be examined: {error.strerror}"


def _too_long(path: Path) -> str | None:
    longest = max(len(os.fsencode(part)) for part in path.parts) if path.parts else 0
    if longest > _LONGEST_NAME:
        return f"a name in it has {longest} bytes, and file systems allow {_LONGEST_NAME}"
    size = len(os.fsencode(path))
    return f"it has {size} bytes, and the system allows {_LONGEST_PATH - 1}" if size >= _LONGEST_PATH else None


def _may(path: Path, mode: int) -> bool:
    """Return whether this process has the access ``mode``, as the effective user."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _is_closed(path: Path) -> bool:
    return exists(path) and not _may(path, os.X_OK)


def _is_ordinary(path: Path) -> bool:
    mode = path.stat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _is_marked(hint: Any) -> bool:
    return _MARK in getattr(hint, "__metadata__", ()) or any(_is_marked(each) for each in typing.get_args(hint))


def expand_homes(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a dataclass's fields with ``~`` replaced in those that hold paths."""
    names = path_fields(cls)
    return {name: expand_home(value) if name in names else value for name, value in values.items()}
