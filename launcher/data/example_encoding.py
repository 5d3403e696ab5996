"""Render and tokenise a data set's examples once per machine, on all cores."""

from __future__ import annotations

import heapq
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.data.auto import AutoData, EntryField
from launcher.config.model.base import Model
from launcher.data.corpus import read_corpus
from launcher.data.example_store import EncodedBlock, is_intact, write_examples
from launcher.data.example_worker import EncodingTask, WorkerFailed, encode_blocks, read_frame
from launcher.data.progress import TokenisingProgress, estimate_rows, rows_text
from launcher.data.token_cache import given_folder, given_tokenizer, read_bpe, train_bpe
from launcher.errors import EXIT_BAD_INPUT, ConfigError, JobError
from launcher.models.processor import processor_fingerprint
from launcher.models.tokenizer import FastTokenizer
from launcher.utils.build_cache import build_once
from launcher.utils.files import sha256_of

if TYPE_CHECKING:
    from launcher.config.data.auto import DataSource

_FORMAT = 2
_ROWS_A_PROCESS = 64
"""Rows with images for which another process is worth its start."""
_TOKENIZER = "tokenizer.json"
_BYTES_A_PROCESS = 8 << 20
"""Data for which another process is worth its start."""
_WAITING_BLOCKS, _WAITING_IMAGE_BLOCKS = 64, 2
"""Most blocks of a process that wait for those before; the second of rows with images."""


@dataclass(frozen=True, kw_only=True)
class ExampleFolders:
    """Where the tokenised examples of a data set are."""

    train: Path
    evaluation: Path | None
    """``None`` where a share of the others is held out."""
    tokenizer: FastTokenizer
    splits_documents: tuple[bool, ...]
    """For each source whether it is text, which is cut to fit rows."""
    evaluation_splits: tuple[bool, ...]
    """The same of the data to evaluate on."""


def example_folders(
    data: AutoData, model: Model, *, heartbeat: Callable[[], None], processes: int | None = None
) -> ExampleFolders:
    """Return the folders of the tokenised examples of ``data``, built if missing.

    Any number of processes may call this at once: one builds, the others wait.

    Args:
        data: whose examples.
        model: whose tokenizer they may be for.
        heartbeat: called meanwhile.
        processes: that render and tokenise; by default as many as the size of the data and the cores suggest. The
            result does not depend on it.

    Raises:
        ConfigError: a row gives no example, or the tokenizer cannot be used.
        JobError: a process that tokenises was killed.
    """
    data.check_shapes([*data.sources(), *data.sources("eval_path")])
    given = None if data.trains_tokenizer else given_tokenizer(data, model, heartbeat=heartbeat)
    own = None if given is None else given_folder(data, model, heartbeat=heartbeat)
    template = data.template(own)
    processor = own if template is not None and template.image_token else None

    def built(field: EntryField, known: FastTokenizer | None) -> tuple[Path, FastTokenizer]:
        sources = data.sources(field)

        def build(folder: Path) -> None:
            heartbeat()
            tokenizer = known or train_bpe(read_corpus(data), vocab_size=data.vocab_size)
            (folder / _TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
            task = EncodingTask(
                sources=sources,
                template=template,
                tokenizer=tokenizer.to_json(),
                end_id=tokenizer.end_id,
                worker=0,
                num_workers=processes or _num_processes(sources, images=processor is not None),
                processor=processor,
            )
            write_data(folder, task, vocab_size=tokenizer.vocab_size, heartbeat=heartbeat)

        spec = data.trained_tokenizer if known is None else f"{known.end_id} {sha256_of(known.to_json().encode())}"
        decides = [_FORMAT, data.examples_fingerprint(sources, template), spec]
        key = json.dumps(decides if processor is None else [*decides, processor_fingerprint(processor)])
        folder = data.cache_folder / sha256_of(key.encode())[:32]
        option = "data.cache" if data.cache else "XDG_CACHE_HOME"
        build_once(
            folder, build, heartbeat=heartbeat, option=option, is_intact=lambda one: _is_whole(one, heartbeat=heartbeat)
        )
        return folder, known or read_bpe(folder / _TOKENIZER)

    train, tokenizer = built("path", given)
    evaluation = built("eval_path", tokenizer)[0] if data.entries("eval_path") else None
    return ExampleFolders(
        train=train,
        evaluation=evaluation,
        tokenizer=tokenizer if data.chat_template == "auto" else replace(tokenizer, chat_template=template),
        splits_documents=tuple(source.is_documents for source in data.sources()),
        evaluation_splits=tuple(source.is_documents for source in data.sources("eval_path")),
    )


def _is_whole(folder: Path, *, heartbeat: Callable[[], None]) -> bool:
    return (folder / _TOKENIZER).is_file() and is_intact(folder, heartbeat=heartbeat)


def _num_processes(sources: Sequence[DataSource], *, images: bool) -> int:
    num_bytes = sum(file.path.stat().st_size for source in sources for file in source.files)
    most = num_bytes // _BYTES_A_PROCESS
    if images:
        most = max(most, sum(source.num_rows or 0 for source in sources) // _ROWS_A_PROCESS)
    return max(1, min(len(os.sched_getaffinity(0)), most))


def write_data(folder: Path, task: EncodingTask, *, vocab_size: int, heartbeat: Callable[[], None]) -> None:
    """Tokenise a data set into an empty folder.

    Args:
        folder: to fill.
        task: all of it; its ``num_workers`` processes share it.
        vocab_size: one more than the largest token number.
        heartbeat: called meanwhile.
    """
    progress = TokenisingProgress(rows_text, total=estimate_rows(task.sources))
    texts_a_row = 2 if task.is_paired else 1

    def counted() -> Iterator[EncodedBlock]:
        for block in encoded_blocks(task, heartbeat=heartbeat):
            progress.add(len(block.lengths) // texts_a_row, tokens=len(block.ids))
            yield block

    left_out = write_examples(
        folder,
        counted(),
        num_sources=len(task.sources),
        vocab_size=vocab_size,
        is_paired=task.is_paired,
        heartbeat=heartbeat,
        filler=None if task.processor is None else partial(_filler, task.processor),
    )
    progress.end(processes=task.num_workers)
    if left_out:
        print(f"{left_out:,} examples are left out: none of their tokens is trained", flush=True)


def _filler(processor: Path) -> bytes:
    from launcher.data.image_examples import ExamplePreparer
    from launcher.models.processor import load_processor

    return ExamplePreparer(load_processor(processor, option="model.name")).filler()


def encoded_blocks(task: EncodingTask, *, heartbeat: Callable[[], None]) -> Iterator[EncodedBlock]:
    """Yield the blocks of a data set in their order, whatever the number of processes.

    Raises:
        ConfigError: a row gives no example.
        JobError: a process was killed, or failed.
    """
    if task.num_workers == 1:
        for block in encode_blocks(task):
            heartbeat()
            yield block
        return
    workers: list[_Worker] = []
    try:
        for number in range(task.num_workers):
            workers.append(_Worker(replace(task, worker=number)))  # noqa: PERF401  (the ones before must be stopped)
        yield from heapq.merge(*(worker.blocks(heartbeat) for worker in workers), key=lambda block: block.key)
    except WorkerFailed as failed:
        raise JobError(f"the data cannot be tokenised: {failed}", exit_code=EXIT_BAD_INPUT) from failed
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that encodes some blocks, and the thread that reads them."""

    def __init__(self, task: EncodingTask) -> None:
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launcher.data.example_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        most = _WAITING_BLOCKS if task.processor is None else _WAITING_IMAGE_BLOCKS
        self._blocks: queue.Queue[EncodedBlock | ConfigError | WorkerFailed | None] = queue.Queue(most)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(pickle.dumps(task),), daemon=True)
        self._thread.start()

    def _read(self, task: bytes) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "it has a pipe"
        assert stdout is not None, "it has a pipe"
        found: EncodedBlock | ConfigError | WorkerFailed | None = None
        while not self._stopped.is_set():
            try:
                if task:
                    stdin.write(task)
                    stdin.close()
                    task = b""
                found = read_frame(stdout)
            except (ConfigError, WorkerFailed) as error:
                found = error
            except OSError as error:
                found = WorkerFailed(f"a process that tokenises the data ended: {error}")
            self._put(found)
            if not isinstance(found, EncodedBlock):
                return

    def _put(self, found: EncodedBlock | ConfigError | WorkerFailed | None) -> None:
        while not self._stopped.is_set():
            try:
                self._blocks.put(found, timeout=1)
            except queue.Full:
                continue
            return

    def blocks(self, heartbeat: Callable[[], None]) -> Iterator[EncodedBlock]:
        """Yield the blocks of this process."""
        while True:
            try:
                found = self._blocks.get(timeout=1)
            except queue.Empty:
                heartbeat()
                continue
            if found is None:
                return
            if not isinstance(found, EncodedBlock):
                raise found
            yield found

    def stop(self) -> None:
        """End the process and the thread."""
        self._stopped.set()
        self._process.kill()
        self._thread.join()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # the task was not written whole
