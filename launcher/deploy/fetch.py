"""Copy a model's files from an object store: ``python -m launcher.deploy.fetch URL FOLDER``.

An init container runs it before the server. Files are copied under a temporary name, so that a folder that a killed
container left behind is completed, not trusted.
"""

from __future__ import annotations

import posixpath
import sys
from pathlib import Path, PurePosixPath

from launcher.errors import EnvironmentProblem, LauncherError


def main() -> None:
    """Copy, and exit with 0; 2 if it fails, with the reason."""
    url, folder = sys.argv[1:]
    try:
        copied = fetch_folder(url, Path(folder))
    except LauncherError as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(problem.exit_code)
    print(f"{copied} files of {url} are in {folder}", flush=True)


def fetch_folder(url: str, folder: Path) -> int:
    """Copy every file below ``url`` into ``folder`` and return their number.

    Files that have the right size already are not copied again.

    Raises:
        EnvironmentProblem: the package for this kind of URL is missing, or the files cannot be read or written.
    """
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
        found = {path: info for path, info in files.find(root, detail=True).items() if info["type"] == "file"}
        if not found:
            raise EnvironmentProblem(f"{url} holds no files; check the address and the login in deploy.secret")
        for path, info in found.items():
            _fetch(files, path, folder / _relative(path, root), size=info["size"])
    except (OSError, ImportError, ValueError) as error:
        raise EnvironmentProblem(f"{url} cannot be copied: {error}") from error
    return len(found)


def _relative(path: str, root: str) -> PurePosixPath:
    """Return the path of a file below the folder.

    Raises:
        EnvironmentProblem: the store names a file outside of it.
    """
    relative = PurePosixPath(posixpath.relpath(path, root))
    if ".." in relative.parts or relative.is_absolute():
        raise EnvironmentProblem(f"the store names {path}, which is not below {root}")
    return relative


def _fetch(files: object, path: str, target: Path, *, size: int) -> None:
    if target.is_file() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    files.get_file(path, str(temporary))  # type: ignore[attr-defined]
    if temporary.stat().st_size != size:
        raise EnvironmentProblem(f"{path} has {temporary.stat().st_size} bytes instead of {size}")
    temporary.replace(target)


if __name__ == "__main__":
    main()
