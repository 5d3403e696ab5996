"""Find runs: by id, by directory, and by the index of runs outside of ``run.root``.

The index is a file in ``run.root`` with one JSON object a line:
``{"run_dir": …, "relative": …, "run_id": …, "name": …}``. A line whose folder holds no run, because it was removed or
moved, is skipped. ``relative`` finds folders that moved together with the root.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.paths import expand_home, is_named_path
from launcher.errors import ConfigError
from launcher.protocol.rundir import RUN_INDEX, RunDir
from launcher.runs.state import written_at
from launcher.utils.files import read_regular, write_atomic
from launcher.utils.text import did_you_mean

_FIELDS = ("run_dir", "relative", "run_id", "name")
_MOST_RUNS = 10_000
"""Limit of runs that are read, the newest ones."""


@dataclass(frozen=True, kw_only=True)
class IndexedRun:
    """A run in the index whose directory exists."""

    run_dir: RunDir
    full_id: str
    """``<name>/<id>``, the form of a run below the root."""


def is_below(run_dir: RunDir, root: Path) -> bool:
    """Whether a run is found without the index: ``<root>/<name>/<id>``, or a sweep's trial."""
    path, folder = run_dir.path.absolute(), root.absolute()
    if not path.is_relative_to(folder):
        return False
    parts = path.relative_to(folder).parts
    return len(parts) == 2 or (len(parts) == 3 and parts[1].startswith("sweep-"))


def add_run(root: Path, run_dir: RunDir, *, run_id: str, name: str) -> bool:
    """Add a run to the index of an existing ``root``; return False if it is not needed.

    It is not needed for a run that is in the index already, or that is found without it.

    Raises:
        OSError: the index cannot be written.
    """
    if is_below(run_dir, root):
        return False
    path = str(run_dir.path.absolute())
    entry = {"run_dir": path, "relative": os.path.relpath(path, root.absolute()), "run_id": run_id, "name": name}
    with _locked(root / RUN_INDEX) as descriptor:
        before = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        if any(known == entry for known in _entries(before)):
            return False
        os.lseek(descriptor, 0, os.SEEK_END)
        _write(descriptor, (b"" if not before or before.endswith(b"\n") else b"\n") + _line(entry))
    return True


def forget_run(root: Path, run_dir: RunDir) -> None:
    """Remove a run from the index, because nothing of it was started."""
    file, path = root / RUN_INDEX, str(run_dir.path.absolute())
    if not file.is_file():
        return
    with _locked(file) as descriptor:
        before = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        kept = [entry for entry in _entries(before) if entry["run_dir"] != path]
        if kept:
            write_atomic(file, b"".join(map(_line, kept)))  # a process that waits for the lock opens the new file
        else:
            file.unlink(missing_ok=True)


def indexed_runs(root: Path) -> list[IndexedRun]:
    """Return the existing runs in the index of ``root``, each once."""
    try:
        entries = list(_entries(read_regular(root / RUN_INDEX)))[-_MOST_RUNS:]
    except OSError:
        return []
    found: dict[Path, IndexedRun] = {}
    for entry in entries:
        for path in (Path(entry["run_dir"]), Path(os.path.normpath(root.absolute() / entry["relative"]))):
            run_dir = RunDir(path)
            if path.is_absolute() and run_dir.snapshot.is_file():
                found[path] = IndexedRun(run_dir=run_dir, full_id=f"{entry['name']}/{entry['run_id']}")
                break
    return list(found.values())


def _entries(data: bytes) -> Iterator[dict[str, str]]:
    """Yield the lines that are complete and have the expected fields."""
    for line in data.splitlines():
        try:
            entry: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in _FIELDS):
            yield {name: entry[name].replace("\0", "") for name in _FIELDS}


def _line(entry: dict[str, str]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _write(descriptor: int, data: bytes) -> None:
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(data)


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """Open and lock the index; retry if another launcher removed it in between.

    The locked file is the index itself, whose descriptor filelock does not give.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.lstat()):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def find_run(word: str | None, root: Path) -> RunDir:
    """Return the run that ``word`` names.

    Args:
        word: a run directory, a run id or how it begins, with or without its name before it (``gpt2/20260101``);
            ``None`` is the newest run below ``root``.
        root: the folder of all runs.

    Raises:
        ConfigError: it names no run, or several.
    """
    if word is not None and is_named_path("run", word) and _is_run(Path(expand_home(word))):
        return RunDir(Path(expand_home(word)).absolute())
    known = _known(root)
    if word is None:
        if not known:
            raise ConfigError("--root", root, why="has no run", fix="name a run directory, or --root DIR")
        return next(iter(known.values()))
    ids = known
    if not word:
        raise ConfigError("run", "''", why="is empty", fix="name a run, or leave the word out for the newest one")
    meant = [full for full in ids if _begins(full, word)]
    exact = [full for full in meant if word in (full, _without_name(full))]
    if len(exact or meant) == 1:
        return ids[(exact or meant)[0]]
    if meant:
        fix = f"write more of it: {', '.join(sorted(meant)[:5])}{', …' if len(meant) > 5 else ''}"
        raise ConfigError("run", word, why=f"{len(meant)} runs in {root} begin with it", fix=fix)
    if Path(word).is_dir():
        raise ConfigError("run", word, why="holds no run.yaml", fix="name a run directory (runs/<name>/<id>)")
    close = did_you_mean(word, ids) if ids and len(ids) < 20 else "launch runs lists the existing ones"
    raise ConfigError("run", word, why=f"is not a run directory, and no run in {root} begins with it", fix=close)


def list_runs(root: Path) -> list[RunDir]:
    """Return every run of ``root``, the newest first.

    These are the runs below it, and those in its index (``run.dir``).
    """
    return list(_known(root).values())


def _known(root: Path) -> dict[str, RunDir]:
    """Return the runs of ``root`` by their full ids, the newest first."""
    snapshots = [*root.glob("*/*/run.yaml"), *root.glob("*/sweep-*/*/run.yaml")]
    below = (RunDir(path.parent.absolute()) for path in snapshots)
    found = {run_dir.path.relative_to(root.absolute()).as_posix(): run_dir for run_dir in below}
    for indexed in indexed_runs(root):
        # a run may have been copied to a second directory: then the path distinguishes them
        full_id = indexed.full_id if indexed.full_id not in found else str(indexed.run_dir.path)
        found[full_id] = indexed.run_dir
    return dict(sorted(found.items(), key=lambda item: written_at(item[1].snapshot), reverse=True))


def _is_run(folder: Path) -> bool:
    return RunDir(folder).snapshot.is_file()


def _begins(full: str, word: str) -> bool:
    """Return whether ``word`` names a run: its name, or how its id begins.

    ``gpt2`` does not name a run of ``gpt2_tiny``.
    """
    return full.startswith(word if "/" in word else f"{word}/") or _without_name(full).startswith(word)


def _without_name(full: str) -> str:
    return full.partition("/")[2]
