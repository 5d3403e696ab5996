"""Preferences as rows: two answers to a pair, kept or left out together, the same on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.config.data.auto import AutoData
from launcher.config.model.gpt2 import Gpt2
from launcher.data.dataloader import Loader, MicroBatch
from launcher.data.dataset import Splits, open_splits
from launcher.data.rows import IGNORE_INDEX, PairRows
from launcher.engines.distributed import num_items
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch

LENGTH = 64


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"{number}?", "chosen": f"yes {number}", "rejected": "no " * (1 + number % 4)}


def opened(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Splits:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"chat_template": "none", "vocab_size": 300, "cache": str(folder / "cache"), **options}
    data = AutoData(path=str(folder / "pairs.jsonl"), **options)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    model = Gpt2(name="tiny", **sizes, max_position_embeddings=LENGTH, vocab_size=300)
    return open_splits(data, model, sequence_length=LENGTH, seed=0)


def batch_of(micro_batch: int, data_parallel: int) -> Batch:
    steps = 8 // micro_batch // data_parallel
    return Batch(micro_batch=micro_batch, gradient_accumulation_steps=steps, data_parallel=data_parallel)


def answers(splits: Splits, batch: MicroBatch) -> list[str]:
    assert splits.tokenizer is not None
    return [splits.tokenizer.decode(row[row != IGNORE_INDEX].tolist()) for row in batch.labels]


def test_the_chosen_answers_come_first_and_the_rejected_ones_in_their_order(tmp_path: Path) -> None:
    splits = opened(tmp_path, [pair(number) for number in range(40)])
    assert splits.is_paired
    (batch,) = Loader(splits, batch_of(8, 1), seed=0, rank=0).step(0)
    assert batch.is_paired
    assert batch.labels.shape[0] == 16
    assert num_items([batch]) == 8
    said = answers(splits, batch)
    for chosen, rejected in zip(said[:8], said[8:], strict=True):
        number = int(chosen.split()[1])
        assert chosen.startswith(f"yes {number}")
        assert rejected.startswith(pair(number)["rejected"])


def test_the_pairs_of_a_step_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    splits = opened(tmp_path, [pair(number) for number in range(40)])
    (whole,) = Loader(splits, batch_of(8, 1), seed=0, rank=0).step(3)
    expected = answers(splits, whole)
    found: list[list[str]] = [[], []]
    for part in range(2):  # segments of the global batch, each over both ranks
        for rank in range(2):
            said = answers(splits, Loader(splits, batch_of(2, 2), seed=0, rank=rank).step(3)[part])
            found[0] += said[:2]
            found[1] += said[2:]
    assert found[0] + found[1] == expected


def test_what_the_reference_says_follows_its_pair(tmp_path: Path) -> None:
    splits = opened(tmp_path, [pair(number) for number in range(40)])
    assert isinstance(splits.train, PairRows)
    loader = Loader(splits, batch_of(4, 1), seed=0, rank=0)
    known = np.arange(2.0 * splits.train.num_sequences).reshape(-1, 2)
    loader.use_references(train=known, held_out=-known[: splits.held_out.num_sequences])
    numbers = [splits.train_order.index(0, position) for position in range(4)]
    reference = loader.step(0)[0].reference
    assert reference is not None
    assert reference.tolist() == [2 * number for number in numbers] + [2 * number + 1 for number in numbers]


def test_pairs_that_only_fill_up_do_not_count(tmp_path: Path) -> None:
    splits = opened(tmp_path, [pair(number) for number in range(40)], held_out=0.125)
    loader = Loader(splits, batch_of(8, 1), seed=0, rank=0)
    ((batch,),) = loader.held_out(100)
    assert splits.held_out.num_sequences == 5
    assert num_items([batch]) == 5
    labelled = (batch.labels != IGNORE_INDEX).any(dim=1)
    assert torch.equal(labelled, torch.tensor(([True] * 5 + [False] * 3) * 2))


def test_a_pair_is_dropped_where_one_answer_is_too_long(tmp_path: Path) -> None:
    long = [{**pair(number), "rejected": "no " * 200} for number in range(5)]
    rows = [*long, *(pair(number) for number in range(5, 40))]
    with pytest.raises(ConfigError, match="are longer"):
        opened(tmp_path, rows)
    splits = opened(tmp_path, rows, on_long="drop")
    assert splits.train.num_sequences + splits.held_out.num_sequences == 35
    cut = opened(tmp_path, rows, on_long="truncate")
    assert cut.train.num_sequences + cut.held_out.num_sequences == 40
    for index in range(cut.train.num_sequences):
        assert isinstance(cut.train, PairRows)
        assert max(cut.train.lengths(index)) <= LENGTH


def test_preferences_that_meet_other_rows_on_a_rank_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "q", "response": "a"}) + "\n")
    with pytest.raises(ConfigError, match="train on them in two runs"):
        opened(tmp_path, [pair(1), pair(2)], eval_path=str(tmp_path / "text.jsonl"))
