"""The working tree as one archive: files that git tracks or does not ignore, as they are."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import ConfigError, ConfigErrors, EnvironmentProblem
from launcher.plugins.loading import OPTION, LoadedPlugin
from launcher.utils.files import sha256_of

LIMIT_BYTES = 64 * 2**20
"""Limit of all files together, before packing: every host receives the whole archive."""

_TIMEOUT_S = 60
_REDIRECTS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")  # set where a git hook starts a run


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The packed code."""

    sha256: str
    """SHA-256 of ``payload``; equal trees give equal hashes."""
    payload: bytes = field(repr=False)
    """A tar.gz."""


def make_bundle(root: Path, plugins: Sequence[LoadedPlugin] = ()) -> Bundle:
    """Return the working tree at ``root``, with the packages of plugins beside it.

    Args:
        root: of the working tree.
        plugins: of the run.

    Raises:
        ConfigErrors: a plugin has the name of something in the tree, or a file of another plugin's name.
        EnvironmentProblem: git is missing or fails, the tree is too big, a file cannot be read, or a link leads out.
    """
    paths = sorted(set(_listed(root)))
    if not paths:
        raise EnvironmentProblem(f"git lists no file in {root}: install the same version on every host instead")
    added = _plugin_files(root, paths, plugins)
    _check_size(root, [*paths, *(path for _, path in added)])
    packed = io.BytesIO()
    try:
        with (
            gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in paths:
                _add(archive, root, path)
            for folder, path in added:
                _add(archive, folder, path)
    except OSError as error:
        raise EnvironmentProblem(f"{error.filename} cannot be sent to the hosts: {error.strerror}") from error
    payload = packed.getvalue()
    return Bundle(sha256=sha256_of(payload), payload=payload)


def _plugin_files(root: Path, paths: Sequence[Path], plugins: Sequence[LoadedPlugin]) -> list[tuple[Path, Path]]:
    """Return the files of plugins that are not in the tree.

    Each comes with the folder that its name in the bundle is relative to.

    Raises:
        ConfigErrors: a plugin has the name of something in the tree, or a file of another plugin's name.
    """
    in_tree = {name.removesuffix(".py"): root / name for name in (path.relative_to(root).parts[0] for path in paths)}
    sources = {path.relative_to(root): path for path in paths}
    added, errors = [], []
    for plugin in plugins:
        top = plugin.module.partition(".")[0]
        if plugin.folder != root and top in in_tree:
            errors.append(_same_name(plugin, plugin.package, in_tree[top]))
            continue
        for path in plugin.files:
            name = path.relative_to(plugin.folder)
            if name not in sources:
                sources[name] = path
                added.append((plugin.folder, path))
            elif sources[name] != path:  # two plugins may share a package
                errors.append(_same_name(plugin, path, sources[name]))
    if errors:
        raise ConfigErrors(errors)
    return added


def _same_name(plugin: LoadedPlugin, own: Path, other: Path) -> ConfigError:
    why = f"{own} would replace {other}, or be merged with it, in the code that backend.code=sent sends to the hosts"
    return ConfigError(OPTION, plugin.module, why=why, fix=f"rename {own}")


def _listed(folder: Path) -> Iterator[Path]:
    """Yield the absolute paths of the files to send; a nested repository is listed separately."""
    for name in _git_ls_files(folder):
        path = folder / os.fsdecode(name)
        if path.is_symlink() or path.is_file():  # not files that were deleted and not committed
            yield path
        elif path.is_dir() and (path / ".git").exists():
            yield from _listed(path)


def _git_ls_files(folder: Path) -> Iterable[bytes]:
    # Not bytecode either, even if no .gitignore names it: it differs from run to run, and so would the SHA-256.
    others = ["--others", "--exclude-standard", "--exclude=__pycache__/"]
    command = ["git", "-C", str(folder), "ls-files", "--cached", *others, "-z"]
    env = {name: value for name, value in os.environ.items() if name not in _REDIRECTS}
    try:
        ended = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, env=env, check=False)
    except FileNotFoundError as error:
        raise EnvironmentProblem("git is not installed: it is needed to send the working tree") from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"git did not list {folder} within {_TIMEOUT_S} s") from error
    if ended.returncode != 0:
        said = ended.stderr.decode(errors="replace").strip()
        raise EnvironmentProblem(f"{folder} cannot be sent to the hosts, git failed to list it: {said}")
    return filter(None, ended.stdout.split(b"\0"))


def _check_size(root: Path, paths: Iterable[Path]) -> None:
    sizes = sorted(((path.lstat().st_size, path) for path in paths), reverse=True)
    total = sum(size for size, _ in sizes)
    if total > LIMIT_BYTES:
        biggest = ", ".join(f"{os.path.relpath(path, root)} ({_mebibytes(size)})" for size, path in sizes[:3])
        raise EnvironmentProblem(
            f"the working tree {root} holds {_mebibytes(total)}, and at most {_mebibytes(LIMIT_BYTES)} are sent to "
            f"every host; the biggest files are {biggest}: name what is not code in .gitignore"
        )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _add(archive: tarfile.TarFile, root: Path, path: Path) -> None:
    """Add one file without times, owners, or modes beyond "executable".

    These differ between checkouts.
    """
    info = tarfile.TarInfo(str(path.relative_to(root)))
    if path.is_symlink():
        target = path.readlink()
        if target.is_absolute() or not (path.parent / target).resolve().is_relative_to(root.resolve()):
            raise EnvironmentProblem(f"{path} is a link that leads out of {root}: name it in .gitignore")
        info.type, info.linkname = tarfile.SYMTYPE, str(target)
        archive.addfile(info)
        return
    content = path.read_bytes()
    info.size, info.mode = len(content), 0o755 if path.stat().st_mode & 0o100 else 0o644
    archive.addfile(info, io.BytesIO(content))
