"""Rows of examples: packed whole or batched by length, in exact shares, the same on any number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config.data.mixture import exact_weights, mixture_pattern, weights_error
from launcher.config.data.order import ByLength, Mixture, Shuffled
from launcher.data.dataloader import Loader, MicroBatch
from launcher.data.dataset import Splits
from launcher.data.example_rows import OpenedRows, RowSettings, open_rows
from launcher.data.example_store import EncodedBlock, ExampleStore, held_out_examples, is_intact, write_examples
from launcher.data.packing import pack
from launcher.data.rows import IGNORE_INDEX
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch

LENGTH = 32
SETTINGS: dict[str, Any] = {"sequence_length": LENGTH, "packed": True, "on_long": "refuse", "held_out": 0.1, "seed": 5}


def block(source: int, *examples: tuple[Sequence[int], Sequence[int]]) -> EncodedBlock:
    return EncodedBlock(
        key=(source, 0, 0),
        ids=np.array([token for ids, _ in examples for token in ids], np.uint32),
        is_trained=np.array([flag for _, flags in examples for flag in flags], np.uint8),
        lengths=np.array([len(ids) for ids, _ in examples], np.int32),
    )


def example(number: int, length: int) -> tuple[list[int], list[int]]:
    """Return tokens that all tell the example's number, from 1; the first half is the prompt."""
    return [number + 1] * length, [int(at >= length // 2) for at in range(length)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a store of two sources, 150 and 60 examples of 2 to 33 tokens, each the example's number from 1."""
    made = tmp_path / "store"
    made.mkdir()
    lengths = [2 + number * 7 % 32 for number in range(210)]
    blocks = [block(0, *(example(n, lengths[n]) for n in range(start, start + 50))) for start in (0, 50, 100)]
    blocks.append(block(1, *(example(n, lengths[n]) for n in range(150, 210))))
    assert write_examples(made, blocks, num_sources=2, vocab_size=300, heartbeat=lambda: None) == 0
    return made


def opened(folder: Path, *, weights: Sequence[float] | None = None, equal: bool = False, **other: Any) -> OpenedRows:
    settings = RowSettings(**{**SETTINGS, **other})
    return open_rows(folder, settings, weights=weights, equal_shapes=equal, heartbeat=lambda: None)


def loader(rows: OpenedRows, batch: Batch, *, rank: int = 0, seed: int = 3) -> Loader:
    splits = Splits(
        train=rows.train,
        held_out=rows.held_out,
        tokenizer=None,
        vocab_size=300,
        max_length=LENGTH,
        baselines={},
        order=rows.order,
    )
    return Loader(splits, batch, seed=seed, rank=rank)


def one_rank(size: int) -> Batch:
    return Batch(micro_batch=size, gradient_accumulation_steps=1, data_parallel=1)


def test_a_store_returns_what_was_written(folder: Path) -> None:
    store = ExampleStore(folder)
    assert store.sources == [150, 60]
    for number in (0, 49, 50, 209):
        ids, is_trained = store.read(number)
        expected, flags = example(number, 2 + number * 7 % 32)
        assert (ids.tolist(), is_trained.tolist()) == (expected, list(map(bool, flags)))
        assert store.first_trained[number] == max(1, len(ids) // 2)
    assert (ids.dtype, is_trained.dtype) == (np.int64, bool)


def test_examples_without_a_label_are_left_out(tmp_path: Path) -> None:
    """The first token of an example is no label: nothing comes before it."""
    nothing, first_only, last = ([1, 2], [0, 0]), ([3, 4], [1, 0]), ([5, 6], [0, 1])
    blocks = [block(0, nothing, first_only, last), block(1, nothing)]
    assert write_examples(tmp_path, blocks, num_sources=3, vocab_size=1 << 17, heartbeat=lambda: None) == 3
    store = ExampleStore(tmp_path)
    assert store.sources == [1, 0, 0]
    assert store.read(0)[0].tolist() == [5, 6]


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "ends.bin", "lengths.bin", "first_trained.bin"])
def test_a_damaged_store_is_seen(folder: Path, name: str) -> None:
    assert is_intact(folder, heartbeat=lambda: None)
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert not is_intact(folder, heartbeat=lambda: None)
    (folder / name).write_bytes(raw[:-4])
    assert not is_intact(folder, heartbeat=lambda: None)


@pytest.mark.parametrize("seed", [0, 1, -7, 1 << 70])
def test_packing_keeps_examples_whole_and_rows_full(seed: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 129, 20_000)
    rows = pack(lengths, capacity=128, seed=seed)
    assert sorted(rows.examples.tolist()) == list(range(20_000))
    filled = np.add.reduceat(lengths[rows.examples], rows.starts[:-1])
    assert filled.max() <= 128
    assert filled.sum() / (128 * len(rows)) > 0.99
    again = pack(lengths, capacity=128, seed=seed)
    assert np.array_equal(again.examples, rows.examples)
    assert np.array_equal(again.starts, rows.starts)
    assert not np.array_equal(pack(lengths, capacity=128, seed=seed + 1).examples, rows.examples)


def documents_of(batch: MicroBatch) -> list[tuple[list[int], list[int]]]:
    """Return inputs and labels of each document of packed rows, by their positions; padding left out."""
    assert batch.position_ids is not None
    found = []
    for inputs, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append((inputs[start:end].tolist(), labels[start:end].tolist()))
    return found


def test_an_epoch_of_packed_rows_shows_each_example_once_with_its_labels(folder: Path) -> None:
    rows = opened(folder)
    is_held_out = held_out_examples([150, 60], 0.1)
    assert (is_held_out[:150].sum(), is_held_out[150:].sum()) == (15, 6)
    load = loader(rows, one_rank(1))
    seen = []
    for step in range(rows.train.num_sequences):
        (batch,) = load.step(step)
        assert batch.input_ids.shape == (1, LENGTH)
        for inputs, labels in documents_of(batch):
            if inputs[0] == 0:  # padding, a document of its own
                assert set(inputs) == {0}
                assert set(labels) == {IGNORE_INDEX}
                continue
            ids, trained = example(inputs[0] - 1, len(inputs) + 1)
            assert inputs == ids[:-1]
            expected = [token if flag else IGNORE_INDEX for token, flag in zip(ids[1:], trained[1:], strict=True)]
            assert labels == expected
            seen.append(inputs[0] - 1)
    assert sorted(seen) == np.flatnonzero(~is_held_out).tolist()


def test_the_fill_rate_is_the_share_of_places_that_hold_tokens(folder: Path) -> None:
    rows, load = opened(folder), loader(opened(folder), one_rank(8))
    places = rows.train.num_sequences * LENGTH
    real = sum(1 + number * 7 % 32 for number in np.flatnonzero(~held_out_examples([150, 60], 0.1)).tolist())
    assert f"{real / places:.1%} full" in rows.summary
    (batch,) = load.step(0)
    empty = sum(len(inputs) for inputs, _ in documents_of(batch) if inputs[0] == 0)
    assert load.padding(0) == pytest.approx(empty / (8 * LENGTH))


def test_batches_by_length_pad_little_and_lose_nothing(folder: Path) -> None:
    rows = opened(folder, packed=False)
    load = loader(rows, one_rank(8))
    seen: Counter[int] = Counter()
    longest = []
    for step in range(rows.train.num_sequences // 8):
        (batch,) = load.step(step)
        assert batch.position_ids is None
        assert batch.input_ids.shape[1] % 8 == 0
        lengths = [int((row == row[0]).sum()) for row in batch.input_ids]
        for inputs, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            size = 1 + (inputs[0] - 1) * 7 % 32
            assert inputs[:size] == [inputs[0]] * size
            assert labels[size:] == [IGNORE_INDEX] * (len(labels) - size)
            assert sum(label != IGNORE_INDEX for label in labels) == min(size, size + 1 - (size + 1) // 2)
            seen[inputs[0]] += 1
        longest.append(max(lengths))
    assert max(seen.values()) == 1
    assert len(seen) == rows.train.num_sequences // 8 * 8
    by_length = np.mean([load.padding(step) for step in range(20)])
    shuffled = loader(replace(rows, order=Shuffled(rows.train.num_sequences)), one_rank(8))
    assert by_length < 0.7 * np.mean([shuffled.padding(step) for step in range(20)])
    assert len(set(longest)) > 2


def test_pipelines_get_batches_of_one_shape(folder: Path) -> None:
    load = loader(opened(folder, packed=False, equal=True), one_rank(4))
    assert {load.step(step)[0].input_ids.shape for step in range(9)} == {(4, LENGTH)}


def first_tokens(rows: OpenedRows, batch: Batch, step: int) -> list[list[int]]:
    """Return the samples of a step in the order of the global batch."""
    shares = [loader(rows, batch, rank=rank).step(step) for rank in range(batch.data_parallel)]
    return [
        sorted(set(row) - {0})
        for part in range(batch.gradient_accumulation_steps)
        for share in shares
        for row in share[part].input_ids.tolist()
    ]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(folder: Path, packed: bool, weights: Any) -> None:
    rows = opened(folder, packed=packed, weights=weights)
    for step in (0, 3, 40):
        whole = first_tokens(rows, one_rank(12), step)
        for micro, accumulation, ranks in ((1, 12, 1), (3, 2, 2), (1, 3, 4), (6, 1, 2)):
            split = Batch(micro_batch=micro, gradient_accumulation_steps=accumulation, data_parallel=ranks)
            assert first_tokens(rows, split, step) == whole


def test_a_run_continues_from_its_cursor_with_another_batch(folder: Path) -> None:
    """In the middle of a packed epoch of a mixture."""
    rows = opened(folder, weights=[0.3, 0.7])
    before = [first_tokens(rows, one_rank(12), step) for step in range(4)]
    load = loader(rows, one_rank(6))
    load.continue_at(2, sequences=24)
    resumed = [sorted(set(row) - {0}) for step in range(2, 6) for row in load.step(step)[0].input_ids.tolist()]
    assert resumed == [row for step in before[2:] for row in step]


@pytest.mark.parametrize(
    "weights", [[1], [0.5, 0.5], [0.3, 0.7], [1, 2, 4], [0.9, 0.05, 0.05], [5, 0, 3], [0.123, 0.456, 0.421]]
)
def test_each_source_has_its_share_within_one_at_every_length(weights: list[float]) -> None:
    exact = exact_weights(weights)
    pattern, total = mixture_pattern(exact), sum(exact)
    counts = [0] * len(weights)
    for drawn, source in enumerate(itertools.chain(pattern, pattern), 1):
        counts[source] += 1
        assert all(abs(count - drawn * weight / total) < 1 for count, weight in zip(counts, exact, strict=True))


@pytest.mark.parametrize(
    ("weights", "why"),
    [([0, 0], "sum to 0"), ([1, -1], "0 or more"), ([float("nan"), 1], "0 or more"), ([0.123456789, 1], "precise")],
)
def test_weights_that_make_no_mixture_are_refused(weights: list[float], why: str) -> None:
    error = weights_error("data.weights", weights)
    assert error is not None
    assert why in str(error)
    assert weights_error("data.weights", [0.25, 3]) is None


def test_a_mixture_shows_each_source_evenly_and_in_exact_shares() -> None:
    order = Mixture([10, 4], exact_weights([0.5, 0.5]))
    drawn = [order.index(7, position) for position in range(40)]
    assert sorted(number for number in drawn if number < 10) == sorted([*range(10)] * 2)
    assert sorted(number for number in drawn if number >= 10) == sorted([*range(10, 14)] * 5)
    assert drawn != [order.index(8, position) for position in range(40)]


def by_length(inner: Any, sizes: list[int], epoch: int | None) -> tuple[ByLength, Callable[[int], int]]:
    def length(number: int) -> int:
        return 1 + number * 37 % 101

    return ByLength(inner, length, sizes=sizes, epoch=epoch), length


def test_order_by_length_keeps_epochs_and_shares() -> None:
    order, length = by_length(Shuffled(5000), [5000], 5000)
    for first in (0, 5000):
        epoch = [order.index(1, first + at) for at in range(5000)]
        assert sorted(epoch) == list(range(5000))
        spread = [np.ptp([length(number) for number in epoch[at : at + 32]]) for at in range(0, 4096, 32)]
        assert max(spread) <= 8
    order, _ = by_length(Mixture([300, 700], exact_weights([0.2, 0.8])), [300, 700], None)
    counts = [0, 0]
    for position in range(6000):
        counts[order.index(1, position) >= 300] += 1
        assert abs(counts[0] - 0.2 * (position + 1)) < 1


@pytest.mark.parametrize(("on_long", "left"), [("drop", 14), ("truncate", 20)])
def test_long_examples(tmp_path: Path, on_long: str, left: int) -> None:
    """An example of n tokens takes n - 1 places; those whose answer is cut off are left out."""
    made = tmp_path / "store"
    made.mkdir()
    examples = [example(number, 2 + number) for number in range(20)]
    write_examples(made, [block(0, *examples)], num_sources=1, vocab_size=300, heartbeat=lambda: None)
    with pytest.raises(ConfigError, match=r"6 of 20 examples are longer .the longest needs 20"):
        opened(made, sequence_length=14, packed=False)
    rows = opened(made, sequence_length=14, packed=False, on_long=on_long)
    assert rows.train.num_sequences + rows.held_out.num_sequences == left
    assert max(rows.train.num_tokens(row) for row in range(rows.train.num_sequences)) <= 14


def test_a_part_without_examples_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "store"
    made.mkdir()
    write_examples(made, [block(0, example(1, 4))], num_sources=2, vocab_size=300, heartbeat=lambda: None)
    with pytest.raises(ConfigError, match=r"data\.held_out"):
        opened(made)
    made = tmp_path / "two"
    made.mkdir()
    two = block(0, example(1, 4), example(2, 4))
    write_examples(made, [two], num_sources=2, vocab_size=300, heartbeat=lambda: None)
    with pytest.raises(ConfigError, match=r"data\.weights.*source 2"):
        opened(made, weights=[0.5, 0.5])


def test_evaluation_of_packed_rows_counts_each_example_once(folder: Path) -> None:
    rows = opened(folder)
    load = loader(rows, one_rank(4))
    batches = [part for together in load.held_out(1000) for part in together]
    counted = sum(int((part.labels != IGNORE_INDEX).sum()) for part in batches)
    expected = 0
    for number in np.flatnonzero(held_out_examples([150, 60], 0.1)).tolist():
        expected += sum(example(number, 2 + number * 7 % 32)[1][1:])
    held_out = rows.held_out
    assert counted == expected == sum(held_out.num_labels(row) for row in range(held_out.num_sequences))
