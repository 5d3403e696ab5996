"""Folders of object stores (``s3://``, ``gs://``, …) through fsspec."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.errors import EnvironmentProblem


class ObjectFolder:
    """A folder in an object store.

    Args:
        url: of the folder.
        login: where its login comes from, for messages.

    Raises:
        EnvironmentProblem: the package for this kind of URL is missing.
    """

    def __init__(self, url: str, *, login: str) -> None:
        import fsspec

        self.url, self._login = url.rstrip("/"), login
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise EnvironmentProblem(f"{url} cannot be used: {error}; build the image with that package") from error

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file below the folder, by path; none without the folder.

        Raises:
            EnvironmentProblem: the store does not answer, or names a file outside of the folder.
        """
        with self._errors("read"):
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._root, detail=True).items()
            except FileNotFoundError:
                return {}
        return {str(self._relative(path)): info["size"] for path, info in found if info["type"] == "file"}

    def fetch(self, folder: Path, *, wanted: Callable[[str], bool] = lambda _: True) -> int:
        """Copy files into ``folder`` and return their number.

        Those that are there with the right size are kept. Each is copied under a temporary name: a folder that a killed
        process left behind is completed, not trusted.

        Raises:
            EnvironmentProblem: a file cannot be read or written, or does not have its size.
        """
        sizes = {name: size for name, size in self.sizes().items() if wanted(name)}
        for name, size in sizes.items():
            target = folder / name
            if target.is_file() and target.stat().st_size == size:
                continue
            with self._errors("copied"):
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.part")
                self._files.get_file(f"{self._root}/{name}", str(temporary))
                if temporary.stat().st_size != size:
                    raise OSError(f"{name} has {temporary.stat().st_size} bytes instead of {size}")
                temporary.replace(target)
        return len(sizes)

    def put(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files of ``folder`` into the store, one after the other.

        Raises:
            FileNotFoundError: a file has been removed from ``folder``.
            EnvironmentProblem: the store refuses a file.
        """
        for name in names:
            source, target = folder / name, f"{self._root}/{name}"
            try:
                with self._errors("written"):
                    self._files.makedirs(posixpath.dirname(target), exist_ok=True)
                    self._files.put_file(str(source), target)
            except EnvironmentProblem:
                source.stat()  # removed meanwhile: this is the error then
                raise

    def remove(self, names: Iterable[str]) -> None:
        """Remove files from the store.

        Raises:
            EnvironmentProblem: the store does not remove one.
        """
        for name in names:
            with self._errors("written"):
                self._files.rm_file(f"{self._root}/{name}")

    def _relative(self, path: str) -> PurePosixPath:
        relative = PurePosixPath(posixpath.relpath(path, self._root))
        if ".." in relative.parts or relative.is_absolute():
            raise EnvironmentProblem(f"the store names {path}, which is not below {self._root}")
        return relative

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each protocol's package raises its own
            said: Any = f"{type(error).__name__}: {error}".splitlines()[0]
            text = f"{self.url} cannot be {what} ({said}); check the address and the login in {self._login}"
            raise EnvironmentProblem(text) from error
