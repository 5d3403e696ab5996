"""A process that renders and tokenises some blocks of a data set.

    python -m launcher.data.example_worker        with a pickled EncodingTask on standard input

Its parent starts it, so what it unpickles comes from no other place. It writes frames to standard output: a line of
JSON, and the bytes of the arrays that the line counts.
"""

from __future__ import annotations

import json
import pickle
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np

from launcher.config.data.auto import texts_of
from launcher.config.data.examples import Example, RenderedExample
from launcher.data.block_encoder import BlockEncoder
from launcher.data.example_store import BlockKey, EncodedBlock
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.config.data.auto import DataSource
    from launcher.config.data.chat_template import ChatTemplate

BLOCK_ROWS = 256
"""Rows of a file that are encoded together."""


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

    encoder = BlockEncoder(Tokenizer.from_str(task.tokenizer), end_id=task.end_id)
    key: BlockKey | None = None
    waiting: list[RenderedExample] = []
    for found, example in _wanted_examples(task):
        if found != key and key is not None:
            yield encoder.encode(key, waiting)
            waiting = []
        key = found
        waiting += texts_of(example)
    if key is not None:
        yield encoder.encode(key, waiting)


def _wanted_examples(task: EncodingTask) -> Iterator[tuple[BlockKey, Example]]:
    for number, source in enumerate(task.sources):
        for file_number in range(max(1, len(source.files))):
            at = [0]

            def is_wanted(row: int, file_number: int = file_number, at: list[int] = at) -> bool:
                at[0] = row // BLOCK_ROWS  # a row is asked about just before it is read
                return (file_number + at[0]) % task.num_workers == task.worker

            for example in source.examples_of(file_number, task.template, wanted=is_wanted):
                yield (number, file_number, at[0]), example


def write_frame(stream: IO[bytes], rows: EncodedBlock) -> None:
    """Write a block, for :func:`read_frame`."""
    head = {"key": rows.key, "examples": len(rows.lengths), "tokens": len(rows.ids)}
    stream.write(json.dumps(head).encode() + b"\n")
    stream.write(rows.lengths.tobytes() + rows.ids.tobytes() + rows.is_trained.tobytes())


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
    if len(raw) < 4 * examples + 5 * tokens:
        raise WorkerFailed("a process that tokenises the data was killed")
    source, file_number, block = head["key"]
    return EncodedBlock(
        key=(source, file_number, block),
        lengths=np.frombuffer(raw, np.int32, examples),
        ids=np.frombuffer(raw, np.uint32, tokens, 4 * examples),
        is_trained=np.frombuffer(raw, np.uint8, tokens, 4 * (examples + tokens)),
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
