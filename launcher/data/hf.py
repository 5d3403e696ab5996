"""Data sets of the Hugging Face hub, or local files that ``datasets`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from launcher.data import files
from launcher.data.base import Corpus, Piece
from launcher.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    import datasets

_FORMATS = ("arrow", "csv", "json", "parquet", "text")
_TEXT_FORMATS = ("csv", "json", "text")


@dataclass(frozen=True, kw_only=True)
class HfData(Corpus):
    """Anything ``datasets.load_dataset`` opens, one document a row."""

    kind: ClassVar[str] = "hf"
    headline: ClassVar[tuple[str, ...]] = ("path", "tokenizer")

    path: str
    """A hub name (``wikitext``), a local folder, or a format name (``json``, ``csv``, ``parquet``) with ``files``."""

    name: str | None = None
    """The configuration of the data set, where it has several."""

    split: str = "train"
    """The split to read; ``held_out`` is cut from its end."""

    column: str = "text"
    """The column that holds the text."""

    files: tuple[str, ...] = ()
    """Local files or globs, when ``path`` is a format name."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse a format without files, and files without a format."""
        yield from super().problems()
        if self.path in _FORMATS and not self.files:
            fix = f"set data.files=[file.{self.path}]"
            yield ConfigError("data.files", "[]", why=f"data.path={self.path} is a format and needs files", fix=fix)
        if self.path not in _FORMATS and self.files:
            why = f"files need a format as data.path, which is {self.path}"
            yield ConfigError("data.files", list(self.files), why=why, fix=f"set data.path to {' or '.join(_FORMATS)}")

    def preflight(self) -> Iterator[ConfigError]:
        """Yield local files that are missing, empty or not what the format says."""
        yield from super().preflight()
        if self.files:
            found, errors = files.expand(self.files, option="data.files")
            yield from errors
            for file in found:
                if self.path in _TEXT_FORMATS and (problem := files.text_problem(file, option="data.files")):
                    yield problem
        elif self._is_local() and not any(file.is_file() for file in self._local_folder().rglob("*")):
            yield self.refuse("path", "there is no such folder, or it is empty", "give a folder of data files")

    def fingerprint(self) -> str:
        """Return a hash of local files' contents, or of the hub name: the hub is asked once, then the cache serves."""
        where = [self.name, self.split, self.column, self.path]
        if self.files:
            where.append(files.fingerprint(files.expand(self.files, option="data.files")[0]))
        elif self._is_local():
            where.append(files.fingerprint(sorted(file for file in self._local_folder().rglob("*") if file.is_file())))
        return json.dumps(where)

    def pieces(self) -> Iterator[Piece]:
        """Yield each row's text."""
        rows = self._load()
        if self.column not in rows.column_names:
            fix = f"set data.column to one of {', '.join(rows.column_names)}"
            raise self.refuse("column", f"{self.path} has no such column", fix)
        for number, text in enumerate(rows[self.column]):
            if not isinstance(text, str):
                why = f"row {number} holds {type(text).__name__}, not text"
                raise self.refuse("column", why, "choose a column of text")
            yield Piece(text, ends=True)

    def _load(self) -> datasets.Dataset:
        import datasets

        found = [str(file) for file in files.expand(self.files, option="data.files")[0]]
        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(
                str(self._local_folder()) if self._is_local() else self.path,
                self.name,
                split=self.split,
                data_files=found or None,
            )
        except (ConnectionError, TimeoutError) as error:
            raise EnvironmentProblem(
                f"data.path={self.path} is not in the local cache and the hub cannot be reached; fetch it where there "
                f"is a network with `hf download --repo-type dataset {self.path}` and give that folder, or use "
                "data=text"
            ) from error
        except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
            first = str(error.__cause__ or error).strip().split("\n")[0]
            fix = "check data.path, data.name, data.split and data.files"
            raise self.refuse("path", f"datasets cannot read it: {first}", fix) from error

    def _is_local(self) -> bool:
        return self.path.startswith(("/", "./", "../", "~")) or (
            self.path not in _FORMATS and self._local_folder().is_dir()
        )

    def _local_folder(self) -> Path:
        return Path(self.path).expanduser()
