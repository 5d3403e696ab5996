"""What the parent says about data before anything starts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.data.base import Data
from launcher.config.data.bpe import count_folder_tokens, train_byte_level_bpe
from launcher.config.data.files import expand
from launcher.config.data.hf import HfData
from launcher.config.data.text import Text
from launcher.config.model.gpt2 import Gpt2
from launcher.data.dataset import open_splits
from launcher.errors import ConfigError


def problems(data: Data) -> list[str]:
    return [str(problem) for problem in data.validate_machine()]


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"text\0more", "has NUL bytes, the first at position 4; remove them: tr -d "),
        ("été".encode("latin1"), "is not UTF-8: byte 0xe9 at position 0; convert it: iconv -f latin1 -t utf-8"),
        ("text".encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv -f utf-16"),
        (b"\x89PNG\r\n\x1a\n", "is a picture"),
        (b"cut short \xc3", "is not UTF-8: byte 0xc3 at position 10"),
    ],
)
def test_a_file_that_is_not_text(content: bytes, why: str, tmp_path: Path) -> None:
    name = written(tmp_path / "file.txt", content)
    (problem,) = problems(Text(path=name))
    assert problem.startswith(f"data.path={name}: {why}")


def test_text_in_any_script_passes_even_where_the_first_look_cuts_a_letter(tmp_path: Path) -> None:
    for offset in range(3):
        name = written(tmp_path / "file.txt", b"x" * offset + "文字".encode() * 200_000)
        assert not problems(Text(path=name))
    assert not problems(Text())


def test_every_bad_path_is_named_at_once(tmp_path: Path) -> None:
    good, empty = written(tmp_path / "good.txt", b"text"), written(tmp_path / "empty.md", b"")
    found = problems(Text(path=(good, f"{tmp_path}/*.md", f"{tmp_path}/*.rst", "missing.txt", str(tmp_path))))
    assert len(found) == 4
    for expected in (
        f"data.path={empty}: is empty",
        f"data.path={tmp_path}/*.rst: matches no file",
        "data.path=missing.txt: there is no such file",
        f"data.path={tmp_path}: is a folder; name its files: 'data.path={tmp_path}/**/*.txt'",
    ):
        assert any(problem.startswith(expected) for problem in found), expected


def test_globs_cross_folders_and_names_come_once_and_sorted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    names = [written(tmp_path / name, b"x") for name in ("b.txt", "a/c.txt", "odd[1].txt")]
    found, errors = expand([f"{tmp_path}/**/*.txt", names[0], names[2]], option="data.path")
    assert not errors
    assert [str(file) for file in found] == sorted(names)


def test_values_that_cannot_work_are_refused() -> None:
    for wrong in ({"held_out": 1.0}, {"held_out": 0.0}, {"vocab_size": 256}, {"path": ()}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}="):
            Text(**wrong)
    expected = r"^data\.files=\[\]: data.path=json is a format and needs files; set data.files=\[file.json\]"
    with pytest.raises(ConfigError, match=expected):
        HfData(path="json")
    with pytest.raises(ConfigError, match=r"files need a format as data.path"):
        HfData(path="wikitext", files=("a.json",))


def test_local_data_sets(tmp_path: Path) -> None:
    assert "there is no such file" in problems(HfData(path="json", files=("nowhere.jsonl",)))[0]
    assert "is empty" in problems(HfData(path="csv", files=(written(tmp_path / "x.csv", b""),)))[0]
    assert "is damaged" in problems(HfData(path="parquet", files=(written(tmp_path / "x.parquet", b"PAR1\0"),)))[0]
    assert "no such folder" in problems(HfData(path="./nowhere"))[0]
    assert not problems(HfData(path="org/name"))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = written(tmp_path / "file", b"x")
    (problem,) = problems(Text(cache=f"{blocked}/cache"))
    assert problem.startswith(f"data.cache={blocked}/cache: {blocked} is not a folder that this user can write to")
    assert not problems(Text(cache=str(tmp_path / "not" / "yet" / "there")))


LENGTH = 32


def short(data: Text | HfData) -> str:
    (problem,) = data.validate_length(LENGTH)
    return str(problem)


def test_a_corpus_below_one_sequence_is_refused_with_numbers_that_work(tmp_path: Path) -> None:
    """The BPE is trained as a rank would, so that what the message says is so."""
    words = "".join(f"Word {number} of {number * number}. " for number in range(400))
    file = tmp_path / "x.txt"
    for size, fixes in ((700, "data.held_out=0.1"), (150, "job.sequence_length="), (30, "job.sequence_length=")):
        file.write_text(words[:size])
        data = Text(path=str(file), vocab_size=300)
        message = short(data)
        assert fixes in message, message
        found = dict(re.findall(r"(data.held_out|job.sequence_length)=([\d.]+)", message.partition("; ")[2]))
        share, length = float(found.get("data.held_out", 0.05)), int(found.get("job.sequence_length", LENGTH))
        changed = replace(data, held_out=share)
        assert not list(changed.validate_length(length)), message
        assert list(changed.validate_length(length + 1)) or share != 0.05
    file.write_text("a")
    assert short(Text(path=str(file))).endswith("; give more text")
    file.write_text(words)
    assert not list(Text(path=str(file), vocab_size=300).validate_length(LENGTH))


def test_the_plan_counts_as_the_rank_does(tmp_path: Path, model: Gpt2) -> None:
    (tmp_path / "x.csv").write_text("text\n" + "".join(f"some words of row {row}\n" for row in range(30)))
    data = HfData(path="csv", files=(f"{tmp_path}/x.csv",), vocab_size=300, cache=str(tmp_path / "cache"))
    message = short(data)
    with pytest.raises(ConfigError) as refused:
        open_splits(data, model, sequence_length=LENGTH, seed=0)
    assert str(refused.value) == message
    assert message.startswith("data.held_out=0.05: leaves ")


def test_with_another_tokenizer_only_what_no_tokenizer_could_fix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("tiny")
    assert "has 45 tokens" in short(Text(path=f"{tmp_path}/x.txt", tokenizer="model"))
    (tmp_path / "x.txt").write_text("large enough perhaps" * 4)
    assert not list(Text(path=f"{tmp_path}/x.txt", tokenizer="model").validate_length(LENGTH))
    assert not list(Text().validate_length(LENGTH))


def test_the_plan_counts_with_a_tokenizer_on_this_machine(tmp_path: Path) -> None:
    train_byte_level_bpe(["some words of a text"], vocab_size=260).save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / "x.txt"
    file.write_text("many words of it, " * 4)
    data = Text(path=str(file), tokenizer=str(tmp_path))
    assert not list(data.validate_length(LENGTH))
    (problem,) = data.validate_length(LENGTH, tokenizer=tmp_path)
    counted = count_folder_tokens(tmp_path, [file.read_text()])
    assert counted is not None
    assert f"leaves 3 of {counted + 1} tokens to evaluate" in str(problem)
    file.write_text("many words of it, " * 400)
    assert not list(data.validate_length(LENGTH, tokenizer=tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert count_folder_tokens(tmp_path, ["a"]) is None
