"""Rows of a data set of examples: held out or not, packed or by length, and their order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from launcher.config.data.mixture import exact_weights
from launcher.config.data.order import ByLength, Mixture, SampleOrder, Shuffled, sample_index
from launcher.data.example_store import ExampleStore, held_out_examples
from launcher.data.packing import PackedRows, one_a_row, pack
from launcher.data.rows import ExampleRows, PairRows, both_of, piece_tokens
from launcher.errors import ConfigError
from launcher.utils.build_cache import build_once
from launcher.utils.files import sha256_of, write_json


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What decides which examples stand in which row."""

    sequence_length: int
    packed: bool
    """Several examples in a row, as many as fit; otherwise one."""
    on_long: Literal["refuse", "truncate", "drop"]
    """What becomes of examples of more than ``sequence_length`` + 1 tokens."""
    held_out: float
    """Share of the examples of each source that are kept for evaluation; 0 keeps none."""
    seed: int
    """Which examples come together."""
    splits_documents: tuple[bool, ...] = ()
    """For each source whether it is text, which is cut into pieces that fit; by default none is."""


@dataclass(frozen=True, kw_only=True)
class OpenedRows:
    """Training and held-out rows."""

    train: ExampleRows | PairRows
    held_out: ExampleRows | PairRows
    order: SampleOrder
    summary: str
    """How full the rows are."""


def open_rows(
    folder: Path,
    settings: RowSettings,
    *,
    weights: Sequence[float] | None,
    equal_shapes: bool,
    heartbeat: Callable[[], None],
    evaluation: Path | None = None,
    evaluation_splits: tuple[bool, ...] = (),
) -> OpenedRows:
    """Open the rows of a folder of examples; the first process on a machine lays them out.

    Args:
        folder: of an :class:`ExampleStore`.
        settings: of the rows.
        weights: of the sources; ``None`` draws every row once an epoch.
        equal_shapes: whether all batches have ``sequence_length`` tokens a row.
        heartbeat: called meanwhile.
        evaluation: folder of the examples to evaluate on; by default a share of the others.
        evaluation_splits: ``splits_documents`` of those.

    Raises:
        ConfigError: an example is too long, or a part of the data has no examples.
    """
    length, store = settings.sequence_length, ExampleStore(folder)
    settings = replace(settings, packed=settings.packed and not store.is_paired)
    row_length = length if settings.packed or equal_shapes else None

    def rows_of(store: ExampleStore, laid_out: PackedRows) -> ExampleRows | PairRows:
        if store.is_paired:
            return PairRows(store, laid_out.examples, max_tokens=length + 1, row_length=row_length)
        return ExampleRows(store, laid_out, packed=settings.packed, max_tokens=length + 1, row_length=row_length)

    made = _lay_out(folder, replace(settings, held_out=0 if evaluation else settings.held_out), heartbeat=heartbeat)
    train, counted = rows_of(store, _load(made, "train")), json.loads((made / _COUNTS).read_text())
    if evaluation is None:
        held_out = rows_of(store, _load(made, "held_out"))
    else:
        apart = replace(settings, held_out=0, splits_documents=evaluation_splits)
        own = _lay_out(evaluation, apart, heartbeat=heartbeat, mixes=True)
        held_out = rows_of(ExampleStore(evaluation), _load(own, "train"))
    for rows, option in ((train, "data.path"), (held_out, "data.eval_path" if evaluation else "data.held_out")):
        if not rows.num_sequences:
            raise ConfigError(option, why="leaves no example to use", fix="give more examples")
    order = _order(train, counted["rows"], weights=weights)
    summary = _summary(train, settings, tokens=counted["tokens"])
    return OpenedRows(train=train, held_out=held_out, order=order, summary=summary)


def _order(train: ExampleRows | PairRows, sizes: Sequence[int], *, weights: Sequence[float] | None) -> SampleOrder:
    order: SampleOrder = Shuffled(train.num_sequences)
    if weights is not None:
        for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            if weight and not size:
                why = f"source {number + 1} of data.path has a weight and no examples"
                fix = "leave its entry out of data.path, or give examples"
                raise ConfigError("data.weights", weight, why=why, fix=fix)
        order = Mixture(sizes, exact_weights(weights))
    if train.row_length is not None:
        return order
    if weights is None:
        return ByLength(order, train.num_tokens, sizes=[train.num_sequences], epoch=train.num_sequences)
    return ByLength(order, train.num_tokens, sizes=sizes, epoch=None)


def _summary(train: ExampleRows | PairRows, settings: RowSettings, *, tokens: int) -> str:
    rows = train.num_sequences
    if settings.packed:
        full = tokens / (rows * settings.sequence_length)
        fitted = f"{train.num_examples:,} examples packed into {rows:,} rows of {settings.sequence_length:,}"
        return f"{fitted}: {full:.1%} full"
    sides, kind, each = (2, "pairs", " an answer") if isinstance(train, PairRows) else (1, "examples", "")
    what = f"{rows:,} {kind} of {tokens / rows / sides:,.0f} tokens{each} on average"
    if train.row_length is None:
        return f"{what}, batched by length"
    return f"{what}, padded to {train.row_length:,}: {1 - tokens / (rows * sides * train.row_length):.1%} padding"


_FORMAT = 1
_COUNTS = "counts.json"


def _lay_out(folder: Path, settings: RowSettings, *, heartbeat: Callable[[], None], mixes: bool = False) -> Path:
    """Return the folder with the rows of a store, beside it.

    Args:
        folder: of the store.
        settings: of the rows.
        heartbeat: called meanwhile.
        mixes: whether an evaluation takes the first of all rows, not only of those held out.
    """

    def build(made: Path) -> None:
        store = ExampleStore(folder)
        kept: np.ndarray = _fitting(store, settings)
        if store.is_paired:
            kept = np.all(kept.reshape(-1, 2), axis=1)
        is_held_out = held_out_examples(_sizes(store), settings.held_out)
        for name, chosen in (("train", kept & ~is_held_out), ("held_out", kept & is_held_out)):
            rows, sizes = _rows(store, chosen, settings)
            heartbeat()
            if mixes or name == "held_out":
                rows = _mixed(rows)
            if name == "train":
                examples = both_of(rows.examples) if store.is_paired else rows.examples
                tokens = piece_tokens(store, examples, max_tokens=settings.sequence_length + 1)
                write_json(made / _COUNTS, {"rows": sizes, "tokens": int(tokens.sum())})
            np.save(made / f"{name}_examples.npy", rows.examples)
            np.save(made / f"{name}_starts.npy", rows.starts)

    key = json.dumps([_FORMAT, folder.name, repr(settings), mixes])
    return build_once(
        folder.with_name(f"{folder.name}-{sha256_of(key.encode())[:12]}"),
        build,
        heartbeat=heartbeat,
        option="data.cache",
    )


def _load(folder: Path, name: str) -> PackedRows:
    return PackedRows(
        examples=np.load(folder / f"{name}_examples.npy", mmap_mode="r"),
        starts=np.load(folder / f"{name}_starts.npy", mmap_mode="r"),
    )


def _fitting(store: ExampleStore, settings: RowSettings) -> np.ndarray:
    """Return for each example whether it is used.

    Raises:
        ConfigError: one is too long, and that is to be refused.
    """
    most = settings.sequence_length + 1
    is_split: np.ndarray = np.repeat(settings.splits_documents or (False,) * len(store.sources), store.sources)
    is_long: np.ndarray = (store.lengths > most) & ~is_split
    if settings.on_long == "refuse" and is_long.any():
        longest = int(store.lengths.max())
        why = f"{int(is_long.sum()):,} of {len(store):,} examples are longer (the longest needs {longest - 1:,})"
        cuts_image = store.has_images and any(map(store.array_bytes, np.flatnonzero(is_long).tolist()))
        instead = "data.on_long=drop" if cuts_image else "data.on_long=truncate or drop"
        fix = f"set job.sequence_length={longest - 1}, or {instead}"
        raise ConfigError("job.sequence_length", settings.sequence_length, why=why, fix=fix)
    is_usable = settings.on_long != "drop"
    if store.has_images and settings.on_long == "truncate":
        cut = [number for number in np.flatnonzero(is_long).tolist() if store.array_bytes(number)]
        if cut:
            longest = int(store.lengths[cut].max())
            why = f"{len(cut):,} examples with images are longer (the longest needs {longest - 1:,}), and what is cut "
            fix = f"set data.on_long=drop, or job.sequence_length={longest - 1}"
            raise ConfigError("data.on_long", "truncate", why=f"{why}off could be a part of an image", fix=fix)
    kept: np.ndarray = ~is_long | (is_usable & (store.first_trained < most))
    return kept


def _sizes(store: ExampleStore) -> list[int]:
    """Return the examples of each source, or its pairs."""
    return [size // 2 for size in store.sources] if store.is_paired else store.sources


def _rows(store: ExampleStore, chosen: np.ndarray, settings: RowSettings) -> tuple[PackedRows, list[int]]:
    """Return the rows of the chosen examples or pairs, and how many each source has."""
    examples: list[np.ndarray] = []
    starts: list[np.ndarray] = [np.zeros(1, np.int64)]
    sizes, first, num_examples = [], 0, 0
    for source, size in enumerate(_sizes(store)):
        numbers: np.ndarray = first + np.flatnonzero(chosen[first : first + size])
        first += size
        if settings.splits_documents and settings.splits_documents[source]:
            numbers = _pieces(store, numbers, settings.sequence_length)
        rows = one_a_row(numbers)
        if settings.packed and len(numbers):
            lengths = piece_tokens(store, numbers, max_tokens=settings.sequence_length + 1)
            rows = pack(lengths, capacity=settings.sequence_length, seed=(settings.seed << 20) + source)
            rows = PackedRows(examples=numbers[rows.examples], starts=rows.starts)
        examples.append(rows.examples)
        starts.append(rows.starts[1:] + num_examples)
        num_examples += len(rows.examples)
        sizes.append(len(rows))
    return PackedRows(examples=np.concatenate(examples), starts=np.concatenate(starts)), sizes


def _pieces(store: ExampleStore, numbers: np.ndarray, length: int) -> np.ndarray:
    """Return the pieces of documents, each document's together."""
    counts = -(-(store.lengths[numbers].astype(np.int64) - 1) // length)
    documents: np.ndarray = np.repeat(numbers, counts)
    firsts: np.ndarray = np.repeat(np.cumsum(counts) - counts, counts)
    found: np.ndarray = documents + (np.arange(len(documents)) - firsts) * len(store)
    return found


def _mixed(rows: PackedRows) -> PackedRows:
    """Return the same rows, mixed: an evaluation takes the first ones, which are of all sources."""
    order = [sample_index(0, number, len(rows)) for number in range(len(rows))]
    parts = [rows.examples[rows.starts[row] : rows.starts[row + 1]] for row in order]
    return PackedRows(
        examples=np.concatenate(parts) if parts else np.empty(0, np.int64),
        starts=np.cumsum([0, *map(len, parts)], dtype=np.int64),
    )
