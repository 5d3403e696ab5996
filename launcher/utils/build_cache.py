"""Folders that are built once per machine, even if many processes need them at once."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from launcher.errors import EnvironmentProblem
from launcher.utils.files import fsync_folder, home_folder
from launcher.utils.system import disk_full_message


def default_cache_folder(*parts: str) -> Path:
    """Return the launcher's cache folder, which may not exist yet.

    It is ``$XDG_CACHE_HOME/launcher``, or ``~/.cache/launcher``.
    """
    root = os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache"
    return Path(root, "launcher", *parts)


def build_once(
    folder: Path,
    build: Callable[[Path], None],
    *,
    heartbeat: Callable[[], None],
    option: str = "XDG_CACHE_HOME",
    is_intact: Callable[[Path], bool] = Path.is_dir,
) -> Path:
    """Return ``folder``, after building it unless some process already has.

    The first process builds into a temporary neighbour and renames it; the others wait. The lock is the kernel's and
    goes with its process, so a killed builder leaves nothing but a temporary folder, which the next one removes.

    Args:
        folder: the finished folder; it exists only when it is complete.
        build: fills the empty folder it is given, or raises.
        heartbeat: called while waiting, so that the wait does not look like a stall.
        option: what to set to have the folder on another disk.
        is_intact: whether a finished folder still holds what was built; a damaged one is rebuilt.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    if folder.is_dir() and is_intact(folder):
        return folder
    from filelock import FileLock

    def keep_waiting() -> bool:
        heartbeat()
        return False

    lock = FileLock(folder.with_name(f"{folder.name}.lock"), fallback_to_soft=False)  # follows no link, keeps the file
    try:
        held = lock.acquire(cancel_check=keep_waiting)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write the cache folder {folder.parent}: {error}") from error
    with held:
        if folder.is_dir() and is_intact(folder):
            return folder
        if folder.is_dir():
            print(f"{folder} is damaged; it is rebuilt", flush=True)
        _build(folder, build, option)
    return folder


def _build(folder: Path, build: Callable[[Path], None], option: str) -> None:
    prefix = f".{folder.name}.tmp-"
    for stale in folder.parent.glob(f"{prefix}*"):  # we hold the lock, so no other process uses it
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder.with_name(f"{prefix}{os.getpid()}")
    try:
        temporary.mkdir()
        build(temporary)
        _flush(temporary)
        if folder.is_dir():  # damaged; processes that have mapped its files keep them
            folder.rename(temporary.with_name(f"{temporary.name}-damaged"))
        temporary.rename(folder)
        fsync_folder(folder.parent)
        shutil.rmtree(temporary.with_name(f"{temporary.name}-damaged"), ignore_errors=True)
    except BaseException as error:
        trouble = disk_full_message(error, {option: folder.parent})  # before there is room again
        shutil.rmtree(temporary, ignore_errors=True)
        if trouble:
            raise EnvironmentProblem(trouble) from error
        raise


def _flush(folder: Path) -> None:
    """Write every file to the disk.

    A power cut after the rename would otherwise leave empty files behind a complete name.
    """
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def quote_torch_library_path() -> None:
    """Let torch link its extensions although its own path holds a space.

    It writes ``-L`` of that path without quotes.

    Every process calls this before it compiles or loads: with another command ninja would link again.
    """
    found = find_spec("torch")
    if found is None or not found.origin or shlex.quote(found.origin) == found.origin:
        return
    from torch.utils import cpp_extension

    if not cpp_extension.TORCH_LIB_PATH.startswith("'"):
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)


def lacks_compiler(environ: Mapping[str, str], *, which: Callable[[str], str | None]) -> bool:
    """Whether there is no C++ compiler where torch looks for one: in CXX, else g++."""
    return which(environ.get("CXX", "g++")) is None
