"""A process that renders and tokenises some blocks of a data set.

    python -m launcher.data.example_worker        with a pickled EncodingTask on standard input

Its parent starts it, so what it unpickles comes from no other place. It writes frames to standard output: a line of
JSON, and the bytes of the arrays that the line counts.
"""

from __future__ import annotations

import itertools
import json
import pickle
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from launcher.config.data.auto import texts_of
from launcher.config.data.examples import Example, RenderedExample
from launcher.config.data.images import BadImage
from launcher.data.block_encoder import BlockEncoder
from launcher.data.example_store import BlockKey, EncodedBlock
from launcher.data.image_store import ImageStamp
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.config.data.auto import DataSource
    from launcher.config.data.chat_template import ChatTemplate

BLOCK_ROWS = 256
"""Rows of a file that are encoded together."""
_IMAGE_BLOCK_ROWS = 8
"""The same of rows with images, whose pixels are held in memory."""


@dataclass(frozen=True, kw_only=True)
class EncodingTask:
    """What a worker is to encode."""

    sources: Sequence[DataSource]
    template: ChatTemplate | None
    tokenizer: str
    """As ``tokenizers`` writes it."""
    end_id: int | None
    worker: int
    """Number of this worker.
    It takes the blocks whose number, plus that of their file, is this modulo ``num_workers``."""
    num_workers: int
    processor: Path | None = None
    """Folder of the processor of a model that takes images."""

    @property
    def block_rows(self) -> int:
        """Rows of a file that are encoded together."""
        return BLOCK_ROWS if self.processor is None else _IMAGE_BLOCK_ROWS

    @property
    def is_paired(self) -> bool:
        """Whether its examples are preferences: each is two texts."""
        return any(source.shape == "preference" for source in self.sources)


def encode_blocks(task: EncodingTask) -> Iterator[EncodedBlock]:
    """Yield the blocks of a worker in their order.

    Raises:
        ConfigError: a row gives no example.
    """
    from tokenizers import Tokenizer

    if task.processor is not None:
        yield from _encode_with_images(task)
        return
    encoder = BlockEncoder(Tokenizer.from_str(task.tokenizer), end_id=task.end_id)
    for key, block in itertools.groupby(_wanted_examples(task), key=lambda wanted: wanted[0]):
        yield encoder.encode(key, [text for _, _, example in block for text in texts_of(example)])


def _encode_with_images(task: EncodingTask) -> Iterator[EncodedBlock]:
    """Yield the blocks of a worker, with the inputs that the model's processor makes of images."""
    from launcher.data.image_examples import ExamplePreparer
    from launcher.models.processor import load_processor

    assert task.processor is not None, "the model takes images"
    processor = load_processor(task.processor, option="model.name")
    preparer, encoder = ExamplePreparer(processor), BlockEncoder(processor.tokenizer, end_id=task.end_id)
    for key, wanted in itertools.groupby(_wanted_examples(task), key=lambda wanted: wanted[0]):
        prepared = []
        for _, place, example in wanted:
            assert isinstance(example, RenderedExample), "pairs have no images"
            try:
                prepared.append(preparer.prepare(example))
            except BadImage as bad:
                task.sources[key[0]].data.refuse_or_skip(f"{place}: {bad}", bad.fix)
        block = encoder.encode(key, [one.example for one in prepared])
        ends = np.cumsum(block.lengths)
        for one, end, length in zip(prepared, ends, block.lengths, strict=True):
            one.check(block.ids[end - length : end].tolist())
        stamps = tuple(stamp for one in prepared for stamp in one.stamps)
        yield replace(block, arrays=tuple(one.arrays for one in prepared), stamps=stamps)


def _wanted_examples(task: EncodingTask) -> Iterator[tuple[BlockKey, str, Example]]:
    for number, source in enumerate(task.sources):
        for file_number in range(max(1, len(source.files))):
            at = [0]

            def is_wanted(row: int, file_number: int = file_number, at: list[int] = at) -> bool:
                at[0] = row // task.block_rows  # a row is asked about just before it is read
                return (file_number + at[0]) % task.num_workers == task.worker

            for place, example in source.placed_examples_of(file_number, task.template, wanted=is_wanted):
                yield (number, file_number, at[0]), place, example


def write_frame(stream: IO[bytes], rows: EncodedBlock) -> None:
    """Write a block, for :func:`read_frame`."""
    head = {"key": rows.key, "examples": len(rows.lengths), "tokens": len(rows.ids)}
    head |= {"arrays": [len(each) for each in rows.arrays], "stamps": list(map(asdict, rows.stamps))}
    stream.write(json.dumps(head).encode() + b"\n")
    stream.write(rows.lengths.tobytes() + rows.ids.tobytes() + rows.is_trained.tobytes())
    stream.writelines(rows.arrays)


class WorkerFailed(Exception):
    """A worker ended before its last block."""


def read_frame(stream: IO[bytes]) -> EncodedBlock | None:
    """Return the next block; ``None`` after the last one.

    Raises:
        ConfigError: the worker found this wrong with the data.
        WorkerFailed: it ended for another reason.
    """
    line = stream.readline()
    if not line:
        raise WorkerFailed("a process that tokenises the data ended early")
    head = json.loads(line)
    if "refused" in head:
        option, value, why, fix = head["refused"]
        raise ConfigError(option, value, why=why, fix=fix)
    if "error" in head:
        raise WorkerFailed(head["error"])
    if "end" in head:
        return None
    examples, tokens = head["examples"], head["tokens"]
    raw = stream.read(4 * examples + 5 * tokens)
    arrays = [stream.read(size) for size in head["arrays"]]
    if len(raw) < 4 * examples + 5 * tokens or [len(each) for each in arrays] != head["arrays"]:
        raise WorkerFailed("a process that tokenises the data was killed")
    source, file_number, block = head["key"]
    return EncodedBlock(
        key=(source, file_number, block),
        lengths=np.frombuffer(raw, np.int32, examples),
        ids=np.frombuffer(raw, np.uint32, tokens, 4 * examples),
        is_trained=np.frombuffer(raw, np.uint8, tokens, 4 * (examples + tokens)),
        arrays=tuple(arrays),
        stamps=tuple(ImageStamp(**stamp) for stamp in head["stamps"]),
    )


def main() -> None:
    """Encode the blocks of the task on standard input."""
    task: EncodingTask = pickle.load(sys.stdin.buffer)  # noqa: S301  (of the parent)
    output, sys.stdout = sys.stdout.buffer, sys.stderr  # what the reading prints goes to the log
    try:
        for rows in encode_blocks(task):
            write_frame(output, rows)
        output.write(b'{"end": true}\n')
    except ConfigError as error:
        value = None if error.value is None else str(error.value)
        output.write(json.dumps({"refused": [error.option, value, error.why, error.fix]}).encode() + b"\n")
    except Exception:  # noqa: BLE001  (the parent reports it)
        output.write(json.dumps({"error": traceback.format_exc()}).encode() + b"\n")
    output.flush()


if __name__ == "__main__":
    main()
