"""Data sets of the Hugging Face hub, folders of ``datasets``, and local files of rows."""

from __future__ import annotations

import functools
import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from launcher.config.data import files
from launcher.config.data.base import SMALL_CHARS, Corpus, TextChunk
from launcher.config.data.formats import (
    FORMAT_OF,
    KIND_NAMES,
    LOOKED_AT_BYTES,
    BadFile,
    FileFormat,
    full_ending,
    inspect_file,
    kind_of_ending,
    look_bytes_of_each,
)
from launcher.config.data.rows import FirstRows, Record, count_rows, first_rows, json_type, read_rows
from launcher.config.data.split import Slice, parse_split
from launcher.config.option_text import quoted_word
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.utils.hub import HUB_NAME
from launcher.utils.text import did_you_mean

COLUMNAR = ("parquet", "arrow")
_FORMATS = ("arrow", "csv", "json", "parquet", "text")
LONGEST_LINE_BYTES = 256 << 20
"""A longer line is a bad row."""
_FILES_READ = 64
"""Files whose first rows are read before anything starts."""
_COUNTED_BYTES = 16 << 20
"""Files of this size altogether have their rows counted before anything starts."""
_SPLIT_REMEDY = "set data.split=train, or train[:50%]"
_SKIP = "set data.skip_bad_rows=true to skip such rows"
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words that mark a split in the name of a file or folder, as in ``datasets``.

They stand between separators or digits."""

_SPLIT_NAME = re.compile(rf"(?:^|[-._ 0-9/])(?:{'|'.join(SPLITS)})(?:[-._ 0-9/]|$)")

_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""Files of JSON in the folder of a data set that hold no rows."""


@dataclass(frozen=True, kw_only=True)
class HfData(Corpus):
    """Anything ``datasets.load_dataset`` opens, one document a row."""

    kind: ClassVar[str] = "hf"
    summary_fields: ClassVar[tuple[str, ...]] = ("path", "tokenizer")

    path: PathText
    """Hub name (``wikitext``), local folder, or format (``json``, ``csv``, …) with ``files``."""

    name: str | None = None
    """The configuration of the data set, if it has several."""

    split: str = "train"
    """The split to read; ``held_out`` is cut from its end."""

    column: str = "text"
    """The column that holds the text."""

    files: tuple[PathText, ...] | PathText = ()
    """Local file, glob, or a list of them, if ``path`` is a format name.
    Files may be compressed (gzip, bz2, xz, zstd)."""

    skip_bad_rows: bool = False
    """Skip rows without text in ``column`` or that cannot be read, and print their number.
    Null, a number or a list is not text. Otherwise the first such row ends the run."""

    def with_path(self, path: str | tuple[str, ...]) -> Self:
        """Return the same options with other files, or with another data set.

        Raises:
            ConfigError: several files where one data set is named.
        """
        if self.path in _FORMATS:
            return replace(self, files=path)
        if not isinstance(path, str):
            why = f"data.path={self.path} names one data set, and this names several"
            raise ConfigError("job.eval_sets", list(path), why=why, fix="give one name or folder")
        return replace(self, path=path)

    def validate(self) -> Iterator[ConfigError]:
        """Reject a format without files, files without a format, and an invalid or empty split."""
        yield from super().validate()
        yield from self._validate_split()
        if self.path in _FORMATS and not self.files:
            fix = f"set data.files=[file.{self.path}]"
            yield ConfigError("data.files", "[]", why=f"data.path={self.path} is a format and needs files", fix=fix)
        if self.path in _FORMATS and self.name is not None:
            yield self.error("name", "local files have no configurations", "leave data.name out")
        if self.path not in _FORMATS and self.files:
            why = f"files need a format as data.path, which is {self.path}"
            yield ConfigError(
                "data.files", list(self.patterns), why=why, fix=f"data.path: {did_you_mean(self.path, _FORMATS)}"
            )

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield an error for each local file that is missing, empty, malformed or without text."""
        yield from super().validate_machine()
        if self.files:
            is_known = {part.name for part in self._slices} == {"train"}
            if not is_known:
                yield self.error("split", "local files have one split, train", _SPLIT_REMEDY)
            found, errors = files.expand(self.patterns, option="data.files")
            bad = list(files.first_errors(self._validate_files(found), option="data.files"))
            yield from (*errors, *bad)
            if is_known and not errors and not bad:
                yield from self._validate_slices(found)
        elif given := self._files_as_path():
            yield self._files_as_path_error(given)
        elif self.is_local:
            yield from self._validate_folder(self.local_folder)
        elif self.path not in _FORMATS and not HUB_NAME.fullmatch(self.path):
            why = "is neither a folder or file here nor a data set of the hub (org/data)"
            yield self.error("path", why, "check the path, or the name of the data set")

    @property
    def _slices(self) -> tuple[Slice, ...]:
        return parse_split(self.split) or ()

    def _validate_split(self) -> Iterator[ConfigError]:
        parts = parse_split(self.split)
        if parts is None:
            why = "is not a split: give a name, or slices of it like train[:50%] or train[100:200], joined by +"
            yield self.error("split", why, _SPLIT_REMEDY)
        elif all(part.is_always_empty for part in parts):
            yield self.error("split", "is a slice without rows", _SPLIT_REMEDY)

    def _validate_slices(self, found: Sequence[Path]) -> Iterator[ConfigError]:
        """Yield why slices of local files hold no row, if the files are small enough to count."""
        if self.split == "train" or sum(file.stat().st_size for file in found) > _COUNTED_BYTES:
            return
        plain = "data=text data.format=text"
        try:
            formats = [(file, inspect_file(file, plain=plain, by_row=True)) for file in found]
            num_rows = sum(count_rows(file, written, longest_line=LONGEST_LINE_BYTES) for file, written in formats)
        except BadFile:
            return  # further in than the other checks look: the rank that reads the rows names the place
        if not any(part.rows(num_rows) for part in self._slices):
            yield self.error("split", f"selects none of the {num_rows:,} rows", _SPLIT_REMEDY)

    def fingerprint(self) -> str:
        """Return a hash of the local files, or of the hub name, which is looked up once and cached."""
        where = [self.name, self.split, self.column, self.path]
        if self.skip_bad_rows:
            where.append("skip_bad_rows")
        if self.files:
            where.append(files.fingerprint(files.expand(self.patterns, option="data.files")[0]))
        elif self.is_local:
            where.append(files.fingerprint(sorted(file for file in self.local_folder.rglob("*") if file.is_file())))
        return json.dumps(where)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The names and globs of ``files``."""
        return (self.files,) if isinstance(self.files, str) else self.files

    @property
    def source_option(self) -> str:
        """The option that names the text."""
        return "data.files" if self.files else "data.path"

    def small_pieces(self, most: int = SMALL_CHARS) -> list[TextChunk] | None:
        """Return the whole text of small local files, or that of the slices of them."""
        found = files.expand(self.patterns, option="data.files")[0] if self.files else []
        if not found or sum(file.stat().st_size for file in found) > most:
            return None
        if self.reads_files:
            return files.beginning(self.local_pieces(), most)
        if self.path == "text":
            return None  # datasets counts blank lines too
        rows = list(self._file_rows())
        chosen = (rows[number] for part in self._slices for number in part.rows(len(rows)))
        return files.beginning(self.texts_of(chosen), most)

    def local_pieces(self) -> Iterator[TextChunk]:
        """Yield the text of each row of local files."""
        return self.texts_of(self._file_rows())

    def texts_of(self, rows: Iterable[tuple[str, Record]]) -> Iterator[TextChunk]:
        """Yield each row's text.

        Args:
            rows: each with its place, for messages.

        Raises:
            ConfigError: a row holds no text and ``skip_bad_rows`` is off, or none holds any.
        """
        num_rows = num_bad = 0
        is_empty = True
        for where, record in rows:
            num_rows += 1
            problem = self._problem_of(record)
            if not problem:
                text = record.fields[self.column]
                is_empty = is_empty and not text.strip()
                yield TextChunk(text, ends_document=True)
            elif self.skip_bad_rows:
                num_bad += 1
            else:
                raise self._row_error(record, problem, where)
        if is_empty:
            why = f"none of {num_rows:,} rows has text" if num_rows else "there are no rows"
            raise ConfigError("data.column", self.column, why=why, fix="choose a column of text, or give other files")
        if num_bad:
            source = ", ".join(self.patterns) or self.path
            _print_once(
                f"{num_bad:,} of {num_rows:,} rows of {source} have no text and are skipped (data.skip_bad_rows=true)"
            )

    @property
    def reads_files(self) -> bool:
        """Whether rows come from local files, which have one split.

        Slices of it are left to ``datasets``.
        """
        return bool(self.files) and self.split == "train"

    def _file_rows(self) -> Iterator[tuple[str, Record]]:
        """Yield the rows of all files, each with its position."""
        found, errors = files.expand(self.patterns, option="data.files")
        if errors:
            raise errors[0]
        for file in found:
            try:
                written = self.inspect(file)
                unit = "row" if written.kind in ("json", *COLUMNAR) else "line"
                first = self._first_rows(file, written)
                if first.columns and self.column not in first.columns:
                    raise self.column_error(file, first)
                for record in read_rows(file, written, longest_line=LONGEST_LINE_BYTES, columns=(self.column,)):
                    yield f"{unit} {record.line:,} of {file}", record
            except BadFile as bad:
                raise ConfigError("data.files", file, why=bad.why, fix=bad.fix) from bad
            except OSError as error:
                why = f"cannot be read: {error.strerror or error}"
                raise ConfigError("data.files", file, why=why, fix="check the disk it is on") from error

    def _problem_of(self, record: Record) -> str:
        """Return why a row gives no text; empty if it does."""
        if record.problem:
            return record.problem
        value = record.fields.get(self.column)
        if value is None:
            return f"has no text in column {self.column}: it is {'null' if self.column in record.fields else 'missing'}"
        if isinstance(value, str):
            return "" if _is_unicode(value) else "contains half of a surrogate pair, which is not a character"
        return f"has no text in column {self.column}: it is {_type_of(value)}"

    def _row_error(self, record: Record, problem: str, where: str) -> ConfigError:
        if record.problem:
            fix = f"{_SKIP}, or {record.fix}" if record.fix else f"correct it, or {_SKIP}"
            return ConfigError(self.source_option, None, why=f"{where} {problem}", fix=fix)
        return self.error("column", f"{where} {problem}", _SKIP)

    def inspect(self, file: Path, *, look_bytes: int = LOOKED_AT_BYTES) -> FileFormat:
        """Return how a file is written.

        Raises:
            BadFile: it cannot be read, or is of another format than ``path`` says.
        """
        plain = f"data=text {quoted_word('data.path', str(file))} data.format=text"
        found = inspect_file(file, plain=plain, by_row=self.skip_bad_rows, look_bytes=look_bytes)
        if self.path != FORMAT_OF.get(found.kind, found.kind):
            fix = f"set data.path={FORMAT_OF[found.kind]}" if found.kind in FORMAT_OF else f"set {plain}"
            raise BadFile(f"holds {KIND_NAMES[found.kind]}, and data.path is {self.path}", fix)
        return found

    def _first_rows(self, file: Path, found: FileFormat) -> FirstRows:
        return first_rows(file, found, longest_line=LONGEST_LINE_BYTES)

    def _validate_files(self, found: Sequence[Path]) -> Iterator[ConfigError]:
        """Yield errors of unreadable files, and of the first rows."""
        look_bytes = look_bytes_of_each(len(found))
        for number, file in enumerate(found):
            try:
                written = self.inspect(file, look_bytes=look_bytes)
                if written.compression == "zstd" and not self.reads_files:
                    why = f"datasets slices these rows, and does not unpack zstd ({file})"
                    yield self.error("split", why, "set data.split=train, or unpack the files")
                    return
                if number >= _FILES_READ:
                    continue
                first = self._first_rows(file, written)
            except BadFile as bad:
                yield ConfigError("data.files", file, why=bad.why, fix=bad.fix)
                continue
            if first.is_empty:
                yield ConfigError("data.files", file, why="holds no rows", fix="give a file with rows")
            elif error := self.validate_first_rows(file, first):
                yield error

    def validate_first_rows(self, file: Path, first: FirstRows) -> ConfigError | None:
        """Return the error in the first rows of a file, ``None`` without one."""
        if first.columns and self.column not in first.text_columns:
            return self.column_error(file, first)
        if self.skip_bad_rows:
            return None
        bad = ((record, problem) for record in first.records if (problem := self._problem_of(record)))
        record, problem = next(bad, (None, ""))
        return self._row_error(record, problem, f"line {record.line:,} of {file}") if record else None

    def column_error(self, where: object, first: FirstRows) -> ConfigError:
        """Return the error for a column that is not there or holds no text, with those that do."""
        others = first.text_columns or first.columns
        names = ", ".join(first.columns)
        if self.column in first.columns:
            values = (record.fields.get(self.column) for record in first.records)
            held = next((_type_of(value) for value in values if value is not None), "null, or of another type")
            why = f"holds no text in {where} ({held})"
        else:
            why = f"{where} has no such column; it has {names or 'none'}"
        if not first.text_columns and (first.records or self.column in first.columns):
            fix = "no column holds text: write one that does, a string per row"
        else:
            fix = did_you_mean(self.column, others)
        return self.error("column", why, fix)

    def _files_as_path(self) -> list[Path]:
        """Return the files that ``path`` names, where it should name a folder, a format or the hub."""
        full = str(Path(self.path).expanduser())
        if self.path in _FORMATS or Path(full).is_dir():
            return []
        if Path(full).is_file():
            return [Path(full)]
        return sorted(Path(name) for name in glob.glob(full, recursive=True) if Path(name).is_file())  # noqa: PTH207

    def _files_as_path_error(self, found: Sequence[Path]) -> ConfigError:
        """Return the error for files given as ``path``, with the command that reads them."""
        why = "is a file" if len(found) == 1 else f"matches {len(found):,} files"
        plain = f"data=text {quoted_word('data.path', self.path)}"
        try:
            written = inspect_file(found[0], plain=f"{plain} data.format=text")
            if written.kind in FORMAT_OF:
                fix = rows_command(found[0], written, [self.path], column=self.column)
            else:
                fix = plain if written.kind == "text" else f"{plain} data.format=text"
        except BadFile as bad:
            return self.error("path", f"{why} that {bad.why}" if len(found) == 1 else f"{found[0]} {bad.why}", bad.fix)
        return self.error("path", f"{why}, not a folder or a data set of the hub", f"set {fix}")

    def _validate_folder(self, folder: Path) -> Iterator[ConfigError]:
        """Yield why ``datasets`` cannot read a local folder, or which column its files lack."""
        if not folder.is_dir():
            yield self.error(
                "path", "there is no such folder or file", "give a folder of data files, or a data set of the hub"
            )
            return
        found = files.endings(folder)
        if not found:
            yield self.error("path", "is a folder without files", "give a folder of data files")
            return
        known = [ending for ending in found if kind_of_ending(ending) in FORMAT_OF]
        packed = [ending for ending in found if ending.endswith((".zst", ".zstd"))]
        saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
        if saved and ".arrow" in found:  # what save_to_disk wrote, which load_dataset refuses
            words = quoted_word("data.files", [f"{self.path.rstrip('/')}/**/*.arrow"])
            yield self.error("path", "was written by save_to_disk", f"set data.path=arrow {words}")
        elif packed:
            kind = FORMAT_OF.get(kind_of_ending(packed[0]), "text")
            words = quoted_word("data.files", [f"{self.path.rstrip('/')}/**/*{packed[0]}"])
            yield self.error(
                "path", "holds zstd files, which datasets does not unpack", f"set data.path={kind} {words}"
            )
        elif len(readers := {FORMAT_OF[kind_of_ending(ending)] for ending in known}) > 1:
            shown = ", ".join(f"{count} {ending}" for ending, count in found.items() if ending in known)
            words = quoted_word("data.files", [f"{self.path.rstrip('/')}/**/*{known[0]}"])
            why = f"holds files of {len(readers)} formats ({shown}), of which datasets reads one and skips the others"
            yield self.error("path", why, f"set data.path={FORMAT_OF[kind_of_ending(known[0])]} {words}")
        elif skipped := _skipped_by_splits(folder, [*known, *(ending for ending in found if ending == ".txt")]):
            why = f"datasets takes the files named after a split, and skips {skipped.relative_to(folder)}"
            kind = FORMAT_OF.get(kind_of_ending(full_ending(skipped)), "text")
            words = quoted_word("data.files", [f"{self.path.rstrip('/')}/**/*{full_ending(skipped)}"])
            yield self.error(
                "path", why, f"rename it (train-…{full_ending(skipped)}), or set data.path={kind} {words} for all"
            )
        elif not {part.name for part in self._slices} <= {"train", "all"} and _has_one_split(folder):
            why = "no file or folder in it is named after a split, so datasets has one, train"
            yield self.error("split", why, _SPLIT_REMEDY)
        elif (missing := self._missing_split(folder, known)) is not None:
            yield missing
        elif contents := list(self._validate_folder_contents(folder, known)):
            yield from contents
        elif len(known) == 1 and self.split == "train":
            yield from self._validate_folder_column(folder, known[0])
        elif len(read := known or [ending for ending in found if ending == ".txt"]) == 1 and _has_one_split(folder):
            yield from self._validate_slices([file for file in data_files(folder) if full_ending(file) == read[0]])

    def _missing_split(self, folder: Path, endings: Sequence[str]) -> ConfigError | None:
        """Return the error of a split after which no file or folder in ``folder`` is named."""
        named = _named_splits(folder, [*endings, ".txt"])
        wanted = [part.name for part in self._slices if part.name not in (*named, "all")]
        if not named or not wanted:
            return None
        fix = did_you_mean(wanted[0], named)
        return self.error("split", f"the files are named after the splits {', '.join(sorted(named))}", fix)

    def _validate_folder_contents(self, folder: Path, known: Sequence[str]) -> Iterator[ConfigError]:
        """Yield the first file that ``datasets`` would misread.

        It decides by suffix, and assumes commas.
        """
        chosen = [file for file in data_files(folder) if full_ending(file) in known or file.suffix == ".txt"]
        for file in chosen:
            ending = full_ending(file)
            names = f"{self.path.rstrip('/')}/**/*{ending}"
            try:
                found = inspect_file(
                    file, plain="data=text data.format=text", by_row=True, look_bytes=look_bytes_of_each(len(chosen))
                )
            except BadFile as bad:
                yield ConfigError("data.path", file, why=bad.why, fix=bad.fix)
                return
            expected = FORMAT_OF.get(kind_of_ending(ending), "text")
            actual = FORMAT_OF.get(found.kind, "text")
            if actual != expected:
                plain = f"set data=text {quoted_word('data.path', names)} data.format=text"
                fix = plain if actual == "text" else f"set data.path={actual} {quoted_word('data.files', [names])}"
                yield ConfigError(
                    "data.path", file, why=f"ends in {ending} and holds {KIND_NAMES[found.kind]}", fix=fix
                )
                return
            if found.kind == "csv" and found.delimiter != ("\t" if ending.startswith(".tsv") else ","):
                why = f"has {found.delimiter!r} between its cells, which datasets does not look for"
                fix = f"set data.path=csv {quoted_word('data.files', [names])}"
                yield ConfigError("data.path", file, why=why, fix=fix)
                return

    def _validate_folder_column(self, folder: Path, ending: str) -> Iterator[ConfigError]:
        file = min(
            (file for file in data_files(folder) if full_ending(file) == ending),
            default=None,
        )
        if file is None:
            return
        try:
            first = self._first_rows(file, inspect_file(file, plain="data=text data.format=text"))
        except BadFile as bad:
            yield ConfigError("data.path", file, why=bad.why, fix=bad.fix)
            return
        if first.columns and (error := self.validate_first_rows(file, first)):
            yield error

    @property
    def is_on_hub(self) -> bool:
        """Whether ``path`` is a name on the hub."""
        return not self.is_local and self.path not in _FORMATS

    @property
    def is_local(self) -> bool:
        """Whether ``path`` is a local folder rather than a format or a name on the hub."""
        return self.path.startswith(("/", "./", "../", "~")) or (
            self.path not in _FORMATS
            and (self.local_folder.is_dir() or kind_of_ending(full_ending(Path(self.path))) in FORMAT_OF)
        )

    @property
    def local_folder(self) -> Path:
        """The folder that ``path`` names where it is local."""
        return Path(self.path).expanduser()


def rows_command(file: Path, found: FileFormat, names: Sequence[str], *, column: str = "text") -> str:
    """Return the overrides that read rows from the files ``names``; ``file`` is the first.

    Raises:
        BadFile: it has no column of text.
    """
    data = HfData(path=FORMAT_OF[found.kind], files=tuple(names), column=column)
    first = first_rows(file, found, longest_line=LONGEST_LINE_BYTES)
    if first.text_columns and column not in first.text_columns:
        data = replace(data, column=first.text_columns[0])
    error = data.validate_first_rows(file, first)
    if first.is_empty or (error is not None and data.column not in first.text_columns):
        columns = f" (its columns: {', '.join(first.columns)})" if first.columns else ""
        raise BadFile(f"holds {KIND_NAMES[found.kind]} and no column of text{columns}", "write one, a string per row")
    words = ["data=hf", f"data.path={data.path}", quoted_word("data.files", list(names))]
    if data.column != "text":
        words.append(quoted_word("data.column", data.column))
    if error is not None:
        words.append("data.skip_bad_rows=true")
    return " ".join(words)


def split_of_name(name: str) -> str | None:
    """Return the split that a file's name or folder marks; ``None`` if it marks none."""
    words = re.split(r"[-._ 0-9/]+", name)
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def data_files(folder: Path) -> list[Path]:
    """Return a folder's data files in name order, without hidden files and descriptions."""
    found = (file for file in folder.rglob("*") if file.is_file() and file.name not in _DESCRIPTIONS)
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _skipped_by_splits(folder: Path, endings: Sequence[str]) -> Path | None:
    """Return a file that ``datasets`` skips because other files are named after splits."""
    if "configs:" in _text_of(folder / "README.md"):  # the folder itself says which files are of which split
        return None
    chosen = [file for file in data_files(folder) if full_ending(file) in endings]
    named = [bool(_SPLIT_NAME.search(str(file.relative_to(folder).with_suffix("")))) for file in chosen]
    others = (file for file, is_named in zip(chosen, named, strict=True) if not is_named)
    return next(others, None) if any(named) else None


def _has_one_split(folder: Path) -> bool:
    """Return whether nothing in a folder says that a file is of another split than ``train``."""
    names = [str(file.relative_to(folder).with_suffix("")) for file in data_files(folder)]
    is_named = any(_SPLIT_NAME.search(name) or re.search(r"-\d{5}-of-", name) for name in names)
    return not is_named and "configs:" not in _text_of(folder / "README.md")


def _named_splits(folder: Path, endings: Sequence[str]) -> set[str]:
    """Return the splits that names of files in a folder mark.

    None are returned where other splits are possible.
    """
    chosen = [file for file in data_files(folder) if full_ending(file) in endings]
    names = [str(file.relative_to(folder).with_suffix("")) for file in chosen]
    if any(re.search(r"-\d{5}-of-", name) for name in names) or "configs:" in _text_of(folder / "README.md"):
        return set()
    return {SPLITS[word] for name in names for word in re.split(r"[-._ 0-9/]+", name) if word in SPLITS}


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _type_of(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return "a chat (a list of messages)"
    return json_type(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@functools.cache
def _print_once(message: str) -> None:
    print(message, flush=True)
