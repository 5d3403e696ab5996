"""Containers of a Slurm job's steps: their options, and the folders that they see."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from launcher.errors import ConfigError

ContainerKind = Literal["none", "pyxis", "apptainer"]

_MOUNT = re.compile(r"/[^:,]*(?::/[^:,]*(?::(?:ro|rw))?)?")
"""A folder, where the container sees it, and whether it may write there."""
_CACHES = (
    *("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TORCH_HOME", "TORCH_EXTENSIONS_DIR"),
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "WANDB_DIR", "WANDB_CACHE_DIR"),
)
"""Variables that name folders of files that a run reads again."""
_OWN = ("backend.image", "backend.python")
"""Paths that are not mounted: the image itself, and a path inside of it."""


def validate_container(
    kind: ContainerKind, *, image: str | None, python: str | None, mounts: Iterable[str]
) -> Iterator[ConfigError]:
    """Yield an error for each option of containers that cannot be, or has no effect.

    Args:
        kind: what starts containers.
        image: the image.
        python: the interpreter in it.
        mounts: more folders, each ``FOLDER``, ``FOLDER:TARGET`` or ``FOLDER:TARGET:ro``.
    """
    mounts = tuple(mounts)
    if kind == "none":
        for option, value in (("image", image), ("python", python), ("container_mounts", ",".join(mounts) or None)):
            if value is not None:
                fix = "set backend.container=pyxis or apptainer, or leave it out"
                yield ConfigError(f"backend.{option}", value, why="ranks run in no container", fix=fix)
        return
    if image is None:
        why = "needs an image that holds this program and what ranks need"
        yield ConfigError("backend.container", kind, why=why, fix="set backend.image=/shared/image.sqsh (or .sif)")
    for option, value in (("image", image), ("python", python)):
        if value is not None and (not value.strip() or not value.isprintable() or value.startswith("-")):
            why = "is empty, begins with a dash, or holds a control character"
            yield ConfigError(f"backend.{option}", repr(value), why=why, fix="name a file or an address")
    for mount in mounts:
        if not _MOUNT.fullmatch(mount) or not mount.isprintable():
            why = "is not a folder to mount"
            fix = "write /FOLDER, /FOLDER:/WHERE or /FOLDER:/WHERE:ro, without commas"
            yield ConfigError("backend.container_mounts", repr(mount), why=why, fix=fix)


def container_folders(paths: Iterable[tuple[str, str]], *, cwd: Path, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the folders and files that containers see, at the same paths.

    They are the working directory, what the options name, and caches. A file that does not exist yet is written into
    the folder that does.

    Args:
        paths: options with their paths, the run directory too.
        cwd: where relative paths start.
        environ: variables that name caches.
    """
    home = environ.get("HOME", "")
    usual = {"XDG_CACHE_HOME": f"{home}/.cache"} if home else {}
    caches = [{**usual, **environ}.get(name, "") for name in _CACHES]
    wanted = [cwd, *(_existing(cwd / value) for option, value in paths if option not in _OWN and value)]
    wanted += [Path(cache) for cache in caches if cache.startswith("/") and Path(cache).exists()]
    found = sorted({Path(os.path.normpath(path)) for path in wanted}, key=lambda path: len(path.parts))
    kept: list[Path] = []
    for path in found:
        if path != Path("/") and not any(path.is_relative_to(folder) for folder in kept):
            kept.append(path)
    return tuple(kept)


def ops_folder_of_image(image: str, environ: Mapping[str, str]) -> Path:
    """Return the folder of DeepSpeed's native operators that are built in an image.

    The launcher's own is named after the Python of this process, and the image has another one.
    """
    cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/tmp"), ".cache"))  # noqa: S108
    return cache / "launcher" / "ops" / f"image-{hashlib.sha256(image.encode()).hexdigest()[:16]}"


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def validate_mounted(folders: Iterable[tuple[str, str]]) -> Iterator[ConfigError]:
    """Yield an error for each path that no mount can name: commas and colons separate them."""
    for option, value in folders:
        if value.startswith("/") and option not in _OWN and any(mark in value for mark in ",:"):
            why = "holds a comma or a colon, and such a path cannot be mounted in a container"
            yield ConfigError(option, value, why=why, fix="use a path without them, or a link with such a path")
