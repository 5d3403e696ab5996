"""The text of a corpus on a rank: local files, or what ``datasets`` opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.data import files
from launcher.config.data.base import Corpus, TextChunk
from launcher.config.data.formats import FORMAT_OF, BadFile, full_ending, inspect_file, kind_of_ending
from launcher.config.data.hf import LONGEST_LINE_BYTES, HfData, data_files
from launcher.config.data.rows import FirstRows, Record, read_rows
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.plugins.loading import executor

if TYPE_CHECKING:
    import datasets

READERS: dict[str, str] = {
    "auto": "launcher.data.corpus:read_local",
    "text": "launcher.data.corpus:read_local",
    "hf": "launcher.data.corpus:read_dataset",
}
"""Function of each kind of corpus that yields its text."""


def read_corpus(data: Corpus) -> Iterator[TextChunk]:
    """Yield the text of ``data`` in a fixed order.

    Raises:
        ConfigError: a source turns out not to be text.
        EnvironmentProblem: a source cannot be reached.
    """
    chunks: Iterator[TextChunk] = executor("data", data.kind, READERS)(data)
    return chunks


def read_local(data: Corpus) -> Iterator[TextChunk]:
    """Yield the text of local files."""
    return data.local_pieces()


def read_dataset(data: HfData) -> Iterator[TextChunk]:
    """Yield the text of each row, from whole local files or by ``datasets``."""
    return data.local_pieces() if data.reads_files else data.texts_of(_dataset_rows(data))


def _dataset_rows(data: HfData) -> Iterator[tuple[str, Record]]:
    rows = _load_dataset(data)
    if data.column not in rows.column_names:
        raise data.column_error(data.path, FirstRows(tuple(rows.column_names), ()))
    number = 0
    try:
        for number, value in enumerate(rows[data.column], 1):
            yield f"row {number:,}", Record(number - 1, number, {data.column: value})
    except UnicodeDecodeError as error:  # datasets checks no text as it loads it
        _raise_bad_row_of_folder(data)
        byte = error.object[error.start]
        why = f"row {number + 1:,} is not UTF-8: byte 0x{byte:02x} at position {error.start} of its text"
        raise ConfigError("data.path", data.path, why=why, fix="correct the row, or use another data set") from error


def _load_dataset(data: HfData) -> datasets.Dataset:
    import datasets

    found = [str(file) for file in files.expand(data.patterns, option="data.files")[0]]
    keywords: dict[str, Any] = {}
    if data.path == "csv" and found:
        keywords = {"keep_default_na": False, "sep": data.inspect(Path(found[0])).delimiter}
    elif data.is_local and {full_ending(file) for file in data_files(data.local_folder)} & {".csv", ".tsv"}:
        keywords = {"keep_default_na": False}  # the words NA and null are text, as in data.files
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            str(data.local_folder) if data.is_local else data.path,
            data.name,
            split=data.split,
            data_files=found or None,
            **keywords,
        )
    except (ConnectionError, TimeoutError) as error:
        raise EnvironmentProblem(
            f"data.path={data.path} is not in the local cache and the hub cannot be reached; fetch it where there "
            f"is a network with `hf download --repo-type dataset {data.path}` and give that folder, or use "
            "data=text"
        ) from error
    except (ValueError, OSError, EOFError, datasets.exceptions.DatasetGenerationError) as error:
        _raise_bad_row_of_folder(data)
        first = str(error.__cause__ or error).strip().split("\n")[0]
        fix = "check data.path, data.name, data.split and data.files"
        raise data.error("path", f"datasets cannot read it: {first}", fix) from error


def _raise_bad_row_of_folder(data: HfData) -> None:
    """Raise the error for the first unreadable row of a local folder.

    ``datasets`` does not say where it is.
    """
    if not data.is_local:
        return
    for file in data_files(data.local_folder):
        if kind_of_ending(full_ending(file)) not in FORMAT_OF:
            continue
        try:
            found = inspect_file(file, plain="data=text data.format=text")
            bad = (record for record in read_rows(file, found, longest_line=LONGEST_LINE_BYTES) if record.problem)
            record = next(bad, None)
        except BadFile as problem:
            raise ConfigError("data.path", file, why=problem.why, fix=problem.fix) from problem
        if record is not None:
            raise ConfigError("data.path", file, why=f"line {record.line:,} {record.problem}", fix="correct the line")
