"""Names of the sources of a mixture in metrics, and what the plan says and refuses of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launcher.config.compose import compose
from launcher.config.data.mixture import source_names
from launcher.errors import ConfigErrors
from launcher.execution.prepare import prepare

WORDS = ["data=auto", "data.chat_template=chatml", "model=gpt2_tiny", "backend.ranks=1", "parallel=single"]


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        (("chats.jsonl", "notes.txt"), ("chats.jsonl", "notes.txt")),
        (("a/chats.jsonl", "/data/b/chats.jsonl", "./x.csv"), ("a_chats.jsonl", "b_chats.jsonl", "x.csv")),
        (("org/set", "chat-tasks"), ("set", "chat-tasks")),
        (("parts/*.parquet", "more/**/*.parquet"), ("parts_.parquet", "more_.parquet")),
        (("s3://key:secret@host/a.jsonl?token=secret", "https://host/b.jsonl"), ("a.jsonl", "b.jsonl")),
        (("https://key:secret@host/a.jsonl", "https://other/a.jsonl"), ("host_a.jsonl", "other_a.jsonl")),
        (("same.txt", "same.txt"), ("same.txt-1", "same.txt-2")),
        (("p/v_w", "v/w", "z/w"), ("v_w", "w-2", "z_w")),
        (("日本.jsonl", "中国.jsonl"), ("jsonl-1", "jsonl-2")),
        (("~", "..", "/"), ("source-1", "source-2", "source-3")),
    ],
)
def test_each_entry_has_a_name_that_every_tracker_takes(entries: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert source_names(entries) == names
    assert len(set(names)) == len(entries)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) for name in names)


def details(*words: str) -> dict[str, str]:
    return prepare(compose([*WORDS, *words])).plan.details


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(chat)}\n" * 4)
        (tmp_path / f"{name}.txt").write_text("Some text. " * 400)


@pytest.mark.usefixtures("files")
def test_the_plan_names_the_metrics_of_sources() -> None:
    pair = "data.path=[a.jsonl,b.jsonl]"
    assert details(pair)["loss by source"] == (
        "train/a.jsonl/loss, train/b.jsonl/loss, eval/a.jsonl/loss, eval/b.jsonl/loss"
    )
    assert details("job=evaluate", pair)["loss by source"] == "eval/a.jsonl/loss, eval/b.jsonl/loss"
    apart = details(pair, "data.eval_path=a.jsonl")
    assert apart["loss by source"] == "train/a.jsonl/loss, train/b.jsonl/loss"
    assert "loss by source" not in details("data.path=a.jsonl")
    texts = ("data.path=[a.txt,b.txt]", "data.chat_template=auto", "job.sequence_length=64")
    assert "loss by source" not in details(*texts)
    assert "train/b.txt/loss" in details(*texts, "data.weights=[2,1]")["loss by source"]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("data.path=[a.jsonl,b.jsonl]", "job.eval_sets={b.jsonl: a.txt}"),
            "job.eval_sets.b.jsonl: a source of the data has this name",
        ),
        (
            (
                *("data.path=[a.txt,b.txt]", "data.chat_template=auto", "checkpoint.every=1"),
                "checkpoint.best_metric=min:a.txt/loss",
            ),
            "text without weights is one stream",
        ),
        (
            ("data.path=[a.jsonl,b.jsonl]", "checkpoint.every=1", "checkpoint.best_metric=min:c.jsonl/loss"),
            "evaluations measure loss, a.jsonl/loss, b.jsonl/loss",
        ),
    ],
)
def test_names_that_are_taken_or_measure_nothing_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        details(*words)
    assert said in str(caught.value)
