"""Rows of files become tokenised examples: in parallel and in order, once per machine."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config.data.auto import AutoData
from launcher.config.model.gpt2 import Gpt2
from launcher.data import example_encoding
from launcher.data.dataset import Splits, open_splits
from launcher.data.example_encoding import encoded_blocks, example_folders
from launcher.data.example_store import ExampleStore
from launcher.data.example_worker import BLOCK_ROWS, EncodingTask
from launcher.data.rows import IGNORE_INDEX
from launcher.errors import ConfigError, JobError

NUM_CHATS = 3 * BLOCK_ROWS + 10


def chat(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What is {number} plus one?"},
            {"role": "assistant", "content": f"It is {number + 1}." * (1 + number % 3)},
        ]
    }


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def data(tmp_path: Path) -> AutoData:
    """Chats in two files, and prompts with responses."""
    write_rows(tmp_path / "a.jsonl", [chat(number) for number in range(NUM_CHATS)])
    write_rows(tmp_path / "b.jsonl", [chat(number) for number in range(NUM_CHATS, NUM_CHATS + 300)])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"{n}?", "response": f"{n}!"} for n in range(40)])
    return AutoData(
        path=(f"{tmp_path}/[ab].jsonl", str(pairs)),
        chat_template="chatml",
        vocab_size=300,
        cache=str(tmp_path / "cache"),
    )


def quiet() -> None:
    """Take a heartbeat."""


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_result_does_not_depend_on_the_number_of_processes(data: AutoData, model: Gpt2, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2, 3):
        one = replace(data, cache=str(tmp_path / str(processes)))
        found.append(contents(example_folders(one, model, heartbeat=quiet, processes=processes).train))
    assert found[0] == found[1] == found[2]
    store = ExampleStore(next((tmp_path / "3").glob("*/examples.json")).parent)
    assert store.sources == [NUM_CHATS + 300, 40]


def test_examples_keep_their_order_text_and_mask(data: AutoData, model: Gpt2) -> None:
    folders = example_folders(data, model, heartbeat=quiet, processes=2)
    store = ExampleStore(folders.train)
    for number in (0, BLOCK_ROWS, NUM_CHATS - 1, NUM_CHATS + 299):
        ids, is_trained = store.read(number)
        row = chat(number)["messages"]
        text = folders.tokenizer.inner.decode(ids.tolist(), skip_special_tokens=False)
        assert text.startswith(f"<|im_start|>user\n{row[0]['content']}<|im_end|>")
        answer = folders.tokenizer.inner.decode(ids[is_trained].tolist(), skip_special_tokens=False)
        assert answer == f"{row[1]['content']}<|im_end|>\n"


def test_another_process_uses_what_is_there(data: AutoData, model: Gpt2, monkeypatch: pytest.MonkeyPatch) -> None:
    first = example_folders(data, model, heartbeat=quiet).train

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("tokenised twice")

    monkeypatch.setattr(example_encoding, "write_data", fail)
    assert example_folders(data, model, heartbeat=quiet).train == first
    changed = replace(data, train_on="all")
    with pytest.raises(AssertionError, match="twice"):
        example_folders(changed, model, heartbeat=quiet)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_row_is_named(data: AutoData, model: Gpt2, tmp_path: Path, processes: int) -> None:
    write_rows(tmp_path / "b.jsonl", [*[chat(1)] * (BLOCK_ROWS + 5), {"messages": []}])
    bad = replace(data, cache=str(tmp_path / "other"), tokenizer="bpe")
    task = task_of(bad, processes)
    with pytest.raises(ConfigError, match=rf"line {BLOCK_ROWS + 6} of .*b\.jsonl messages is empty"):
        list(encoded_blocks(task, heartbeat=quiet))


def task_of(data: AutoData, processes: int) -> EncodingTask:
    from launcher.config.data.bpe import train_byte_level_bpe

    return EncodingTask(
        sources=data.sources(),
        template=data.template(None),
        tokenizer=train_byte_level_bpe(["some text"] * 9, vocab_size=260).to_str(),
        end_id=0,
        worker=0,
        num_workers=processes,
    )


def test_a_killed_process_ends_the_run(data: AutoData, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Killed(example_encoding._Worker):
        def __init__(self, task: EncodingTask) -> None:
            super().__init__(task)
            started.append(self)
            if task.worker == 1:
                os.kill(self._process.pid, signal.SIGKILL)

    monkeypatch.setattr(example_encoding, "_Worker", Killed)
    with pytest.raises(JobError, match="cannot be tokenised"):
        list(encoded_blocks(task_of(data, 2), heartbeat=quiet))
    assert [worker._process.returncode is None for worker in started] == [False, False]


def opened(data: AutoData, model: Gpt2, **options: Any) -> Splits:
    return open_splits(data, model, sequence_length=options.pop("sequence_length", 64), seed=0, **options)


def test_chats_are_packed_by_default_and_batched_by_length_where_that_does_not_work(
    data: AutoData, model: Gpt2
) -> None:
    long = replace(data, on_long="truncate")
    splits = opened(long, model)
    assert "packed into" in splits.summary
    assert splits.train.row_length == 64
    assert splits.train.row(0).position_ids is not None
    assert opened(long, model, packs=False).train.row_length is None
    padded = opened(long, model, packs=False, equal_shapes=True)
    assert padded.train.row_length == 64
    tokens = sum(map(padded.train.num_tokens, range(padded.train.num_sequences)))
    share = 1 - tokens / (64 * padded.train.num_sequences)
    assert padded.summary.endswith(f" on average, padded to 64: {share:.1%} padding")
    unpacked = replace(long, packing=False)
    assert "batched by length" in opened(unpacked, model).summary


def test_documents_are_cut_into_pieces_that_lose_no_label(model: Gpt2, tmp_path: Path) -> None:
    texts = [f"Document {number}: " + "word " * (5 * number) for number in range(30)]
    file = write_rows(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    data = AutoData(path=str(file), packing=True, vocab_size=300, cache=str(tmp_path / "cache"), held_out=0.2)
    splits = opened(data, model, sequence_length=16)
    assert splits.tokenizer is not None
    found: list[int] = []
    for part in (splits.train, splits.held_out):
        for number in range(part.num_sequences):
            row = part.row(number)
            assert len(row.input_ids) <= 16
            found += row.labels.tolist()
    expected = [token for text in texts for token in [*splits.tokenizer.encode(text), splits.tokenizer.end_id][1:]]
    assert IGNORE_INDEX not in found
    assert sorted(found) == sorted(expected)


def test_data_to_evaluate_on_is_all_of_eval_path(data: AutoData, model: Gpt2, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "eval.jsonl", [chat(number) for number in range(9000, 9007)])
    both = replace(data, eval_path=str(rows), on_long="truncate", packing=False, weights=(0.75, 0.25))
    splits = opened(both, model)
    assert splits.held_out.num_sequences == 7
    assert splits.train.num_sequences == NUM_CHATS + 340
    drawn = [splits.train_order.index(0, position) for position in range(400)]
    assert np.sum(np.array(drawn) >= NUM_CHATS + 300) == 100
