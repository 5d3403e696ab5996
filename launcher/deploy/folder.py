"""The folder of a deployment: what was written into it, and how it differs from a rendering.

``files.json`` lists the files with their SHA-256. A file that is not in it, or that was changed since, belongs to the
user: it is never overwritten and never removed. Before files are written, the list gets their new hashes too, so a
write that was cut short leaves nothing that looks like the user's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.errors import ConfigError, ConfigErrors, EnvironmentProblem
from launcher.runs.lock import RunLock
from launcher.utils.files import read_object, read_regular, sha256_of, write_atomic, write_json
from launcher.utils.processes import identify

LIST = "files.json"
_LOCK = ".lock"
_VERSION = 1
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]+)\.[0-9a-f]{8}\.tmp")
"""Name of the temporary file of ``write_atomic``."""
Files = Mapping[str, str | bytes]
"""Content by relative path; a text is written as UTF-8."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What ``write`` did, as paths in the folder."""

    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """No longer rendered, but changed by the user since they were written."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What ``files.json`` says of a folder."""

    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file by relative path."""
    writing: Mapping[str, str] = field(default_factory=dict)
    """Those of the files of a write that has not ended; each has the one hash or the other."""
    is_promoted: bool = False
    """Whether ``launch deploy promote`` or ``rollback`` set the weights in the files."""

    def is_ours(self, path: str, content: bytes | None) -> bool:
        """Return whether a file has the content that was written."""
        return content is not None and sha256_of(content) in (self.files.get(path), self.writing.get(path))

    def save(self, folder: Path) -> None:
        """Write the list."""
        tree: dict[str, Any] = {"version": _VERSION, "files": dict(sorted(self.files.items()))}
        if self.writing:
            tree["writing"] = dict(sorted(self.writing.items()))
        if self.is_promoted:
            tree["weights_by"] = "promote"
        write_json(folder / LIST, tree)


@contextmanager
def locked(folder: Path, *, option: str = "deploy.out") -> Iterator[None]:
    """Hold the right to write to a folder, which is created.

    Args:
        folder: to lock.
        option: that names it, for errors.

    Raises:
        ConfigError: another process writes to it or promotes its canary, or it cannot be written.
    """
    fix = "wait for it to end, or end it first: a promotion goes on where it was"
    lock = RunLock(folder, name=_LOCK, option=option, user="another launch deploy", fix=fix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _not_written(folder, error, option=option) from error
    try:
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)  # also that of a process that was killed
        lock.release()


def write(folder: Path, files: Files, *, is_promoted: bool = False) -> Written:
    """Write a rendering; remove what an earlier one wrote and this one does not have.

    Args:
        folder: to write into; it is created.
        files: content by relative path.
        is_promoted: whether the weights in them are those that a promotion set.

    Raises:
        ConfigErrors: a file that would be overwritten is the user's; nothing was written.
        ConfigError: the folder cannot be written.
    """
    before = load_list(folder)
    hashes = {path: sha256_of(_encoded(content)) for path, content in files.items()}
    try:
        if errors := list(dict.fromkeys(_not_ours(folder, files, before))):
            raise ConfigErrors([ConfigError("deploy.out", folder, why=why, fix=fix) for why, fix in errors])
        folder.mkdir(parents=True, exist_ok=True)
        _remove_temporary(folder, [*files, *before.files, *before.writing, LIST])
        changed = [path for path, content in files.items() if _read(folder / path) != _encoded(content)]
        old = before.files.keys() | before.writing.keys()
        if changed or before.writing or old - files.keys():
            # what was being written and is not rendered now is ours all the same
            known = {path: before.writing.get(path) or before.files[path] for path in old}
            Listing(files={**known, **before.files}, writing={**known, **hashes}, is_promoted=is_promoted).save(folder)
        for path in changed:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / path, files[path])
        removed, kept = [], []
        for path in old - files.keys():
            found = _read(folder / path)
            if before.is_ours(path, found):
                (folder / path).unlink()
                _remove_empty_folders(folder, path)
                removed.append(path)
            elif found is not None:
                kept.append(path)
        Listing(files=hashes, is_promoted=is_promoted).save(folder)
    except OSError as error:
        raise _not_written(folder, error) from error
    return Written(changed=tuple(changed), removed=tuple(sorted(removed)), kept=tuple(sorted(kept)))


def update(folder: Path, files: Mapping[str, str]) -> None:
    """Replace files that ``write`` wrote by those with the weights of a promotion.

    A file that the user changed since stays listed as it was written, and so the user's.

    Args:
        folder: that was written.
        files: new text by relative path.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    listing = load_list(folder)
    try:
        ours = {
            path: sha256_of(text.encode())
            for path, text in files.items()
            if listing.is_ours(path, _read(folder / path))
        }
        Listing(files=listing.files, writing={**listing.writing, **ours}, is_promoted=True).save(folder)
        for path, text in files.items():
            if _read(folder / path) != text.encode():
                write_atomic(folder / path, text)
        writing = {path: each for path, each in listing.writing.items() if path not in ours}
        Listing(files={**listing.files, **ours}, writing=writing, is_promoted=True).save(folder)
    except OSError as error:
        why = f"{_place(folder, error)} cannot be written: {_reason(error)}"
        raise EnvironmentProblem(f"{why}; free space or permit it, then run the command again") from error


def changed_files(folder: Path, paths: Iterable[str]) -> list[str]:
    """Return those of ``paths`` that are not as ``write`` or ``update`` left them."""
    listing = load_list(folder)
    return [path for path in paths if not listing.is_ours(path, _read(folder / path))]


def difference(folder: Path, files: Files) -> str:
    """Return what ``write`` would change, as a unified diff; empty where nothing."""
    names = {**dict.fromkeys(files), **dict.fromkeys(listed(folder))}
    parts: list[str] = []
    for path in names:
        try:
            before, content = _read(folder / path) or b"", files.get(path, "")
        except OSError as error:
            raise _not_written(folder, error, what="read") from error
        if isinstance(content, bytes):
            parts += [] if before == content else [f"{folder / path} and {path} differ\n"]
            continue
        old, new = before.decode(errors="replace"), content
        parts += difflib.unified_diff(
            old.splitlines(keepends=True),
            new.splitlines(keepends=True),
            fromfile=str(folder / path),
            tofile=path if path in files else "/dev/null",
        )
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def listed(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that was written into ``folder``, by relative path.

    Raises:
        ConfigError: the list is not one that ``write`` made.
    """
    return dict(load_list(folder).files)


def load_list(folder: Path) -> Listing:
    """Return the list of a folder; an empty one without.

    Raises:
        ConfigError: it is not one that ``write`` made.
    """
    try:
        tree = read_object(folder / LIST)
    except (FileNotFoundError, NotADirectoryError):
        return Listing()
    except (OSError, ValueError) as error:
        raise _bad_list(folder, str(error)) from error
    files, writing = tree.get("files"), tree.get("writing", {})
    if tree.get("version") != _VERSION or not isinstance(files, dict) or not isinstance(writing, dict):
        raise _bad_list(folder, "is not the list of this version")
    for path, found in (*files.items(), *writing.items()):
        if not (_is_inside(path) and isinstance(found, str)):
            raise _bad_list(folder, "names a file outside of its folder")
    return Listing(files=files, writing=writing, is_promoted=tree.get("weights_by") == "promote")


def _bad_list(folder: Path, why: str) -> ConfigError:
    fix = "set deploy.out to another folder, or remove this one"
    return ConfigError("deploy.out", folder, why=f"its {LIST} cannot be used: {why}", fix=fix)


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts


def _not_ours(folder: Path, files: Files, before: Listing) -> Iterator[tuple[str, str]]:
    """Yield why files cannot be written, the user's above all, and what to do."""
    if folder.exists() and not folder.is_dir():
        yield "is a file, not a folder", "set deploy.out to a folder"
        return
    for path, content in files.items():
        assert _is_inside(path), f"{path} leaves the folder"
        place = folder / path
        between = [each for each in place.parents if each != folder and each.is_relative_to(folder)]
        if link := next((each for each in (place, *between) if each.is_symlink()), None):
            yield f"{link} is a symbolic link", "remove it"
            continue
        if file := next((each for each in between if each.exists() and not each.is_dir()), None):
            yield f"{file} is a file, and a folder of that name is rendered", "move it away, or choose another folder"
            continue
        try:
            found = _read(place)
        except OSError as error:
            yield f"{place} cannot be replaced: {_reason(error)}", "remove it, or choose another folder"
            continue
        if found is not None and found != _encoded(content) and not before.is_ours(path, found):
            was = "was changed since it was written" if path in before.files else "was not written by launch deploy"
            fix = "move it away (--diff shows the difference), or choose another folder"
            yield f"{place} {was}, and would be overwritten", fix


def _not_written(folder: Path, error: OSError, *, option: str = "deploy.out", what: str = "written") -> ConfigError:
    """Return the error of a folder in which the system refused something."""
    if folder.exists() and not folder.is_dir():
        return ConfigError(option, folder, why="is a file, not a folder", fix="set deploy.out to a folder")
    fix = "set deploy.out to another folder, or free space and permit it, then run the command again"
    return ConfigError(option, folder, why=f"{_place(folder, error)} cannot be {what}: {_reason(error)}", fix=fix)


def _place(folder: Path, error: OSError) -> str:
    return str(folder if error.filename is None else error.filename)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _remove_temporary(folder: Path, paths: Iterable[str]) -> None:
    """Remove the temporary files of these files that a killed process left."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        place = folder / path
        names.setdefault(place.parent, set()).add(place.name)
    for parent, known in names.items():
        for each in parent.glob(".*.tmp"):
            found = _TEMPORARY.fullmatch(each.name)
            if found and found["name"] in known and identify(int(found["pid"])) is None:
                each.unlink(missing_ok=True)


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _read(place: Path) -> bytes | None:
    try:
        return read_regular(place)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove_empty_folders(folder: Path, path: str) -> None:
    for parent in (folder / path).parents:
        if parent == folder or any(parent.iterdir()):
            return
        parent.rmdir()
