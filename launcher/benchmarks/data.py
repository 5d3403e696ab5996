"""The data benchmark's processes: a corpus into an empty cache, batches out of a full one."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.benchmarks.harness import sample_interleaved
from launcher.benchmarks.isolated import pack_component, run_isolated, unpack_component
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
from launcher.config.benchmark.io import DataBenchmark, thread_words
from launcher.config.data.base import Corpus
from launcher.config.model.base import Model
from launcher.data.corpus import read_corpus
from launcher.engines.context import Context
from launcher.protocol.plan import Batch

_DIGESTED_STEPS = 4
_MEASURE, _PREPARE = "launcher.benchmarks.data:measure_reading", "launcher.benchmarks.data:prepare_cache"
_LOAD = "load"


def run_data_benchmark(benchmark: DataBenchmark, context: Context) -> BenchmarkResults:
    """Tokenise under each number of threads and load, in turn."""
    with tempfile.TemporaryDirectory(dir=context.run_dir.path, prefix="tokens-") as folder:
        about = {"data": pack_component(context.run.data), "model": pack_component(context.run.model)}
        cold, full = ({**about, "folder": str(Path(folder) / name)} for name in ("cold", "full"))
        prepared = run_isolated(_PREPARE, full, heartbeat=lambda: context.heartbeat.update("prepare"))
        asked = {
            **{
                _tokenize_case(count): {**cold, "warmup": benchmark.warmup, "threads": count}
                for count in benchmark.threads
            },
            _LOAD: {**full, "warmup": benchmark.warmup, "load": _load(benchmark, context)},
        }
        samples = sample_interleaved(_MEASURE, asked, repeats=benchmark.repeats, context=context)
    cases = [
        BenchmarkCase(
            name=name, samples={key: tuple(one[key] for one in taken) for key in taken[0] if key.endswith("_per_s")}
        )
        for name, taken in samples.items()
    ]
    return BenchmarkResults(
        benchmark=benchmark,
        cases=cases,
        facts={"cold start": prepared, **{name: _tokenization_facts(taken) for name, taken in samples.items()}},
        findings=tuple(_findings(benchmark, prepared, samples, cases)),
        metrics={f"{case.name}/{key}": case.median(key) for case in cases for key in case.samples},
    )


def _load(benchmark: DataBenchmark, context: Context) -> dict[str, Any]:
    names = ("sequence_length", "micro_batch", "duration_s")
    return {**{name: getattr(benchmark, name) for name in names}, "seed": context.run.job.seed}


def _findings(
    benchmark: DataBenchmark,
    prepared: Mapping[str, Any],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    cases: Sequence[BenchmarkCase],
) -> Iterator[str]:
    by_name = {case.name: case for case in cases}
    yield (
        f"corpus: {prepared['text_bytes'] / 1e6:,.2f} MB of text are {prepared['tokens']:,} tokens "
        f"of a vocabulary of {prepared['vocab_size']:,}"
    )
    yield f"first run: {prepared['cold_s']:.2f} s from an empty cache to tokens, its tokenizer included"
    for count in benchmark.threads:
        case = by_name[_tokenize_case(count)]
        rate = f"{case.median('tokens_per_s'):,.0f} tokens/s, {case.median('text_mb_per_s'):.2f} MB/s of text"
        yield f"tokenise by {thread_words(count)}: {rate}"
    first, *others = (by_name[_tokenize_case(count)].median("tokens_per_s") for count in benchmark.threads)
    for count, speed in zip(benchmark.threads[1:], others, strict=True):
        yield f"{thread_words(count)}: {speed / first:.2f} times {thread_words(benchmark.threads[0])}"
    case = by_name[_LOAD]
    rate = f"{case.median('sequences_per_s'):,.0f} sequences/s, {case.median('tokens_per_s'):,.0f} tokens/s"
    yield f"load: {rate}, in one thread"
    for names, what in (([_tokenize_case(n) for n in benchmark.threads], "tokens"), ([_LOAD], "first batches")):
        digests = {sample["digest"] for name in names for sample in samples[name]}
        same = "the same every time" if len(digests) == 1 else f"NOT the same: {len(digests)} different ones"
        yield f"{what}: {same}"


def _tokenize_case(threads: int) -> str:
    return f"tokenise/{threads or 'all'}"


def _tokenization_facts(taken: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values that are not rates: digests once, times and counts of every round."""
    names = [name for name in taken[0] if not name.endswith("_per_s")]
    return {name: sorted({one[name] for one in taken}) for name in names}


def prepare_cache(
    *, data: dict[str, Any], model: dict[str, Any], folder: str, progress: Callable[[], None]
) -> dict[str, Any]:
    """Fill a cache as the first run on a machine does; return its seconds and the corpus size."""
    _import_what_writes()
    from launcher.data.dataset import open_stream
    from launcher.data.token_cache import token_folder

    corpus: Corpus = replace(unpack_component(data), cache=folder)
    text_bytes = _text_bytes(corpus)
    started = time.perf_counter()
    made, tokenizer = token_folder(corpus, unpack_component(model), heartbeat=progress)
    cold_s = time.perf_counter() - started
    tokens = len(open_stream(made))
    return {"cold_s": cold_s, "text_bytes": text_bytes, "tokens": tokens, "vocab_size": tokenizer.vocab_size}


def measure_reading(
    *,
    data: dict[str, Any],
    model: dict[str, Any],
    folder: str,
    warmup: int,
    progress: Callable[[], None],
    threads: int = 0,
    load: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tokenise the corpus, or load batches of it where ``load`` says which; return rates.

    Args:
        data: the corpus, packed.
        model: of the run, packed: its tokenizer may be the corpus's, and its limits hold.
        folder: where tokens are written, or the cache that holds them.
        warmup: times all of it is tokenised, or batches are loaded, before it counts.
        progress: called from time to time.
        threads: that tokenise; 0 is one for each core.
        load: as :func:`load_batches` takes it.
    """
    if load is not None:
        corpus = replace(unpack_component(data), cache=folder)
        return load_batches(corpus, unpack_component(model), warmup=warmup, progress=progress, **load)
    os.environ["RAYON_NUM_THREADS"] = str(threads or len(os.sched_getaffinity(0)))  # read when its pool is made
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    return tokenise(unpack_component(data), unpack_component(model), Path(folder), warmup=warmup, progress=progress)


def tokenise(data: Corpus, model: Model, folder: Path, *, warmup: int, progress: Callable[[], None]) -> dict[str, Any]:
    """Tokenise the whole corpus into a new folder; the tokenizer is there before that."""
    _import_what_writes()
    from launcher.data.dataset import open_stream
    from launcher.data.token_cache import given_tokenizer, train_bpe, write_tokens

    text_bytes = _text_bytes(data)
    started = time.perf_counter()
    own = data.trains_tokenizer
    tokenizer = (
        train_bpe(read_corpus(data), vocab_size=data.vocab_size)
        if own
        else given_tokenizer(data, model, heartbeat=progress)
    )
    tokenizer_s = time.perf_counter() - started
    for _ in range(warmup + 1):
        progress()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.perf_counter()
        write_tokens(folder, data, tokenizer, heartbeat=progress)
        tokenise_s = time.perf_counter() - started
    stream = open_stream(folder)
    digest = hashlib.sha256(stream.read(0, len(stream)).tobytes()).hexdigest()
    return {
        "tokens_per_s": len(stream) / tokenise_s,
        "text_mb_per_s": text_bytes / 1e6 / tokenise_s,
        "tokenise_s": tokenise_s,
        "tokenizer_s": tokenizer_s,
        "digest": digest,
    }


def load_batches(
    data: Corpus,
    model: Model,
    *,
    sequence_length: int,
    micro_batch: int,
    duration_s: float,
    seed: int,
    warmup: int,
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Load batches in the order of training for so many seconds."""
    from launcher.data.dataloader import Loader
    from launcher.data.dataset import open_splits

    started = time.perf_counter()
    splits = open_splits(data, model, sequence_length=sequence_length, seed=seed, heartbeat=progress)
    open_s = time.perf_counter() - started
    loader = Loader(
        splits, Batch(micro_batch=micro_batch, gradient_accumulation_steps=1, data_parallel=1), seed=seed, rank=0
    )
    digest = hashlib.sha256()
    for step in range(_DIGESTED_STEPS):
        for batch in loader.step(step):
            digest.update(batch.input_ids.numpy().tobytes() + batch.labels.numpy().tobytes())
    for step in range(warmup):
        loader.step(step)
    step, updated_at = 0, time.perf_counter()
    started = updated_at
    while (elapsed := time.perf_counter() - started) < duration_s or step == 0:
        loader.step(step)
        step += 1
        if time.perf_counter() - updated_at > 1:
            progress()
            updated_at = time.perf_counter()
    sequences = step * micro_batch
    return {
        "tokens_per_s": sequences * sequence_length / elapsed,
        "sequences_per_s": sequences / elapsed,
        "open_s": open_s,
        "digest": digest.hexdigest(),
    }


def _import_what_writes() -> None:
    """Import what takes seconds and is no part of tokenising."""
    for name in ("datasets.arrow_writer", "pyarrow", "tokenizers"):
        importlib.import_module(name)


def _text_bytes(data: Corpus) -> int:
    return sum(len(piece.text.encode()) for piece in read_corpus(data))
