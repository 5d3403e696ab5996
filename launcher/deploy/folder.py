"""The folder of a deployment: what was written into it, and how it differs from a rendering.

``files.json`` lists the files with their SHA-256. A file that is not in it, or that was changed since, belongs to the
user: it is never overwritten and never removed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.errors import ConfigError, ConfigErrors
from launcher.utils.files import read_object, read_regular, sha256_of, write_atomic, write_json

LIST = "files.json"
_VERSION = 1
Files = Mapping[str, str | bytes]
"""Content by relative path; a text is written as UTF-8."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What ``write`` did, as paths in the folder."""

    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """No longer rendered, but changed by the user since they were written."""


def write(folder: Path, files: Files) -> Written:
    """Write a rendering; remove what an earlier one wrote and this one does not have.

    Args:
        folder: to write into; it is created.
        files: content by relative path.

    Raises:
        ConfigErrors: a file that would be overwritten is the user's; nothing was written.
    """
    before = listed(folder)
    if errors := list(_not_ours(folder, files, before)):
        raise ConfigErrors(errors)
    changed = []
    for path, content in files.items():
        if _read(folder / path) != _encoded(content):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / path, content)
            changed.append(path)
    removed, kept = [], []
    for path in before.keys() - files.keys():
        found = _read(folder / path)
        if found is not None and sha256_of(found) == before[path]:
            (folder / path).unlink()
            _remove_empty_folders(folder, path)
            removed.append(path)
        elif found is not None:
            kept.append(path)
    hashes = {path: sha256_of(_encoded(content)) for path, content in sorted(files.items())}
    write_json(folder / LIST, {"version": _VERSION, "files": hashes})
    return Written(changed=tuple(changed), removed=tuple(sorted(removed)), kept=tuple(sorted(kept)))


def update(folder: Path, files: Mapping[str, str]) -> None:
    """Replace some of the files that ``write`` wrote, and keep the others.

    A file that the user changed since stays listed as it was written, and so the user's.

    Args:
        folder: that was written.
        files: new text by relative path.
    """
    hashes = listed(folder)
    for path, text in files.items():
        found = _read(folder / path)
        is_ours = found is not None and sha256_of(found) == hashes.get(path)
        if found != text.encode():
            write_atomic(folder / path, text)
        if is_ours:
            hashes[path] = sha256_of(text.encode())
    write_json(folder / LIST, {"version": _VERSION, "files": dict(sorted(hashes.items()))})


def changed_files(folder: Path, paths: Iterable[str]) -> list[str]:
    """Return those of ``paths`` that are not as ``write`` or ``update`` left them."""
    hashes = listed(folder)
    return [path for path in paths if sha256_of(_read(folder / path) or b"") != hashes.get(path)]


def difference(folder: Path, files: Files) -> str:
    """Return what ``write`` would change, as a unified diff; empty where nothing."""
    names = {**dict.fromkeys(files), **dict.fromkeys(listed(folder))}
    parts: list[str] = []
    for path in names:
        before, content = _read(folder / path) or b"", files.get(path, "")
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
    try:
        tree = read_object(folder / LIST)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise _bad_list(folder, str(error)) from error
    files = tree.get("files")
    if tree.get("version") != _VERSION or not isinstance(files, dict):
        raise _bad_list(folder, "is not the list of this version")
    for path, found in files.items():
        if not (_is_inside(path) and isinstance(found, str)):
            raise _bad_list(folder, "names a file outside of its folder")
    return dict(files)


def _bad_list(folder: Path, why: str) -> ConfigError:
    fix = "set deploy.out to another folder, or remove this one"
    return ConfigError("deploy.out", folder, why=f"its {LIST} cannot be used: {why}", fix=fix)


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts


def _not_ours(folder: Path, files: Files, before: Mapping[str, str]) -> Iterator[ConfigError]:
    """Yield the files that would be overwritten although the user wrote or changed them."""
    if folder.exists() and not folder.is_dir():
        yield ConfigError("deploy.out", folder, why="is a file, not a folder", fix="set deploy.out to a folder")
        return
    for path, content in files.items():
        assert _is_inside(path), f"{path} leaves the folder"
        place = folder / path
        if link := next((each for each in (place, *place.parents) if each != folder and _is_link(each, folder)), None):
            yield ConfigError("deploy.out", folder, why=f"{link} is a symbolic link", fix="remove it")
            continue
        try:
            found = _read(place)
        except OSError as error:
            why = f"{place} cannot be replaced: {error.strerror or error}"
            yield ConfigError("deploy.out", folder, why=why, fix="remove it, or choose another folder")
            continue
        if found is not None and found != _encoded(content) and sha256_of(found) != before.get(path):
            was = "was changed since it was written" if path in before else "was not written by launch deploy"
            fix = "move it away (--diff shows the difference), or choose another folder"
            yield ConfigError("deploy.out", folder, why=f"{place} {was}, and would be overwritten", fix=fix)


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _is_link(place: Path, folder: Path) -> bool:
    return place.is_relative_to(folder) and place.is_symlink()


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
