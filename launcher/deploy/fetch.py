"""Copy a model's files from an object store: ``python -m launcher.deploy.fetch URL FOLDER``.

An init container runs it before the server.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.errors import EnvironmentProblem, LauncherError
from launcher.utils.object_store import ObjectFolder


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
    copied = ObjectFolder(url, login="deploy.secret").fetch(folder)
    if not copied:
        raise EnvironmentProblem(f"{url} holds no files; check the address and the login in deploy.secret")
    return copied


if __name__ == "__main__":
    main()
