"""Local files and folders through ``datasets``, and what is said where the hub cannot be reached."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from launcher.config.data.hf import HfData
from launcher.config.model.gpt2 import Gpt2
from launcher.data.corpus import read_corpus
from launcher.data.dataset import open_splits
from launcher.errors import ConfigError, EnvironmentProblem

ROWS = [f"Row number {i} holds some words." for i in range(200)]
MakeRows = Callable[..., HfData]


def json_file(folder: Path) -> Path:
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": row, "n": i}) + "\n" for i, row in enumerate(ROWS)))
    return folder / "x.jsonl"


def csv_file(folder: Path) -> Path:
    with (folder / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([row] for row in ROWS)])
    return folder / "x.csv"


def parquet_file(folder: Path) -> Path:
    pyarrow.parquet.write_table(pa.table({"text": ROWS}), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize(("kind", "make"), [("json", json_file), ("csv", csv_file), ("parquet", parquet_file)])
def test_every_format_gives_the_rows_in_order(
    kind: str, make: Callable[[Path], Path], rows: MakeRows, model: Gpt2, tmp_path: Path
) -> None:
    data = rows(kind, make(tmp_path))
    assert not list(data.validate_machine())
    assert [piece.text for piece in read_corpus(data)] == ROWS
    splits = open_splits(data, model, sequence_length=16, seed=0)
    assert splits.tokenizer is not None
    assert splits.tokenizer.decode(splits.train.row(0).input_ids.tolist()).startswith(
        "Row number 0 holds some words.Row"
    )


def test_a_folder_of_several_formats_is_refused(tmp_path: Path) -> None:
    """``datasets`` would read the files of one format and skip the others in silence."""
    json_file(tmp_path)
    assert list(HfData(path=str(tmp_path)).validate_machine()) == []
    csv_file(tmp_path)
    (error,) = HfData(path=str(tmp_path)).validate_machine()
    assert "holds files of 2 formats (1 .csv, 1 .jsonl)" in error.why or "(1 .jsonl, 1 .csv)" in error.why
    assert str(tmp_path) in error.fix


def test_a_local_folder_is_a_data_set(rows: MakeRows, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    json_file(tmp_path / "set")
    data = rows(str(tmp_path / "set"))
    assert not list(data.validate_machine())
    assert next(read_corpus(data)).text == ROWS[0]
    before = data.fingerprint()
    (tmp_path / "set" / "x.jsonl").write_text('{"text": "changed"}\n')
    assert data.fingerprint() != before


def test_a_bad_row_far_into_a_folder_is_named_by_its_file_and_place(rows: MakeRows, tmp_path: Path) -> None:
    """``datasets`` says where in one of its blocks something is wrong, and in no file."""
    folder = tmp_path / "set"
    folder.mkdir()
    line = json.dumps({"text": "words " * 200}).encode() + b"\n"
    count = (2 << 20) // len(line)
    (folder / "a.jsonl").write_bytes(line * count + b'{"text": null}\n')
    data = rows(str(folder))
    assert not list(data.validate_machine())
    with pytest.raises(
        ConfigError, match=rf"data.column=text: row {count + 1:,} has no text in column text: it is null"
    ):
        list(read_corpus(data))
    assert len(list(read_corpus(replace(data, skip_bad_rows=True)))) == count
    (folder / "a.jsonl").write_bytes(line * count + b'{"text": "\xe9"}\n')
    place = f"line {count + 1:,} is not UTF-8: byte 0xe9 at position {len(line) * count + 10}"
    with pytest.raises(ConfigError, match=f"data.path={folder}/a.jsonl: {place}"):
        list(read_corpus(data))


def test_wrong_columns_splits_and_files_are_the_users_mistakes(rows: MakeRows, tmp_path: Path) -> None:
    file = json_file(tmp_path)
    with pytest.raises(
        ConfigError, match=r"data.column=body: .*x.jsonl has no such column; it has text, n; choose from: text"
    ):
        next(read_corpus(rows("json", file, column="body")))
    with pytest.raises(ConfigError, match=r"data.column=n: line 1 of .* has no text in column n: it is a number"):
        next(read_corpus(rows("json", file, column="n")))
    with pytest.raises(ConfigError, match=r"data.path=json: datasets cannot read it: Unknown split"):
        next(read_corpus(rows("json", file, split="test")))
    file.write_text("{not json")
    with pytest.raises(ConfigError, match=r"data.files=.*x.jsonl: ends in .jsonl and holds no JSON lines"):
        next(read_corpus(rows("json", file)))


def test_without_the_hub_the_message_says_what_to_type(rows: MakeRows) -> None:
    with pytest.raises(EnvironmentProblem, match="hf download --repo-type dataset org/name"):
        next(read_corpus(rows("org/name")))
