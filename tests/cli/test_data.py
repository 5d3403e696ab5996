"""``launch data preview``."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.cli.data import _writer
from launcher.config.data.bpe import train_byte_level_bpe
from tests.conftest import REPOSITORY

CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4"}]}
WORDS = ["data=auto", "data.chat_template=chatml", "data.vocab_size=257"]


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(CHAT) + "\n" for _ in range(5)))
    return file


def test_it_shows_rows_with_the_trained_tokens_marked(chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", *WORDS, f"data.path={chat}", "rows=2"]) == 0
    shown = capsys.readouterr().out
    turn = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4<|im_end|>\n⟧"
    assert shown.count(turn) == 2
    assert f"{chat}: 5 rows of conversations (messages), loss on assistant turns" in shown
    num_tokens = len(turn) - 2
    assert f"line 1 of {chat} · {num_tokens} tokens · {len('It is 4<|im_end|>.')} trained\n" in shown


def test_the_preview_that_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [
        [
            {"role": "user", "content": f"What is {number} + {number + 1}?"},
            {"role": "assistant", "content": f"It is {2 * number + 1}."},
        ]
        for number in range(40)
    ]
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in asked))
    page = (REPOSITORY / "docs" / "fine-tune.md").read_text().partition("$ launch data preview ")[2].partition("```")[0]
    command, *expected = page.splitlines()
    assert main(["data", "preview", *command.split()]) == 0
    shown = capsys.readouterr().out.splitlines()
    missing = [line for line in expected if line not in shown and line != "…"]
    assert not missing, shown


@pytest.mark.parametrize(
    ("on_long", "said"),
    [
        ("refuse", "and a sequence takes 41: refused (data.on_long=refuse)"),
        ("drop", "left out: it is longer than a sequence"),
        ("truncate", "left out: it is longer than a sequence"),
    ],
)
def test_it_says_what_happens_to_long_rows(
    chat: Path, on_long: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 40 tokens the whole answer is beyond the end, and an example without trained tokens is left out."""
    words = [*WORDS, f"data.path={chat}", "job.sequence_length=40", f"data.on_long={on_long}", "rows=1"]
    assert main(["data", "preview", *words]) == 0
    assert said in capsys.readouterr().out


def test_a_cut_answer_is_said(chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, f"data.path={chat}", "job.sequence_length=60", "data.on_long=truncate", "rows=1"]
    assert main(["data", "preview", *words]) == 0
    assert "truncated to 61 (data.on_long=truncate)" in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_conversations_without_a_template_are_no_fault_of_a_row(
    choice: str, chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "preview", "data.vocab_size=257", f"data.chat_template={choice}", f"data.path={chat}"]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "data.chat_template=chatml" in said.err
    assert "on_bad_row" not in said.err


def test_rows_are_taken_from_every_source(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("plain words " * 400)
    words = [*WORDS, f"data.path=[{chat},{tmp_path / 'text.txt'}]", "data.weights=[3,1]", "rows=3"]
    assert main(["data", "preview", *words]) == 0
    shown = capsys.readouterr().out
    assert "loss on assistant turns, share 75.0%" in shown
    assert f"{tmp_path / 'text.txt'}: text, share 25.0%" in shown
    assert "text 1 (its first 2,000 characters)" in shown
    assert shown.count("<|im_start|>user") == 2


def test_both_answers_of_a_preference_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "2 + 2?", "chosen": "It is 4", "rejected": "It is 5"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["data", "preview", *WORDS, f"data.path={tmp_path / 'pairs.jsonl'}"]) == 0
    chosen, rejected = capsys.readouterr().out.partition("· rejected ·")[::2]
    assert "· chosen ·" in chosen
    assert "⟦It is 4" in chosen
    assert "⟦It is 5" in rejected
    assert "It is 5" not in chosen


def test_the_tokenizer_of_a_folder_is_used(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = train_byte_level_bpe(["It is 4 "] * 9, vocab_size=262)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = ["data", "preview", *WORDS[:2], f"data.path={chat}", f"data.tokenizer={folder}", "rows=1"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    text = shown.partition(" trained\n")[2].rstrip("\n").replace("⟦", "").replace("⟧", "")
    assert f" · {len(tokenizer.encode(text, add_special_tokens=False).ids)} tokens · " in shown
    assert "⟦It is 4" in shown
    (folder / "tokenizer.json").write_text("{}")
    assert main(words) == 2
    assert "give the folder of a fast tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["rows=0"], "rows=0: takes a number from 1 to 10,000; write rows=3"),
        (["data=synthetic"], "data=synthetic: only data=auto has examples to look at"),
        (["dry_run=false"], "dry_run=false: launch data starts nothing"),
    ],
)
def test_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", *words]) == 2
    assert said in capsys.readouterr().err


def test_on_a_terminal_trained_tokens_are_coloured() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    write = _writer(stream)
    write("said", False)
    write("learnt", True)
    assert "learnt" in stream.getvalue()
    assert "⟦" not in stream.getvalue()
