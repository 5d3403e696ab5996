"""The job evaluate: the loss of the run's data and of named texts, without training."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from launcher.checkpoint.store import CheckpointStore
from launcher.data.dataloader import Loader
from launcher.data.dataset import Splits, open_run_splits
from launcher.data.evaluation import TextWindows
from launcher.engines.base import make_engine, never_preempted
from launcher.errors import ConfigError
from launcher.profiling.performance import StepClock, peak_memory_bytes
from launcher.protocol.metrics import MetricsWriter
from launcher.training.checkpointing import resolve_tokenizer, restore_checkpoint
from launcher.training.early_check import CheckpointCheck
from launcher.training.eval_texts import EvalTexts, set_metrics
from launcher.training.evaluation import EvaluationResult, evaluate
from launcher.training.evaluation_metrics import load_metrics
from launcher.training.source_metrics import SourceMetrics
from launcher.utils.files import write_atomic

if TYPE_CHECKING:
    from launcher.config.job.train import Evaluate
    from launcher.data.rows import Sequences
    from launcher.engines.context import Context


def run_evaluation(job: Evaluate, context: Context) -> None:
    """Evaluate the run's data and the sets ``job.repeats`` times; rank 0 records each result."""
    with CheckpointCheck(context) as check:
        _evaluate_repeatedly(job, context, check)


def _evaluate_repeatedly(job: Evaluate, context: Context, check: CheckpointCheck) -> None:
    heartbeat = context.heartbeat.update
    splits = open_run_splits(
        context.run, resolve_tokenizer(context, context.run.data), heartbeat=lambda: heartbeat("load")
    )
    texts = EvalTexts(job.eval_sets, context, splits, stride=job.window_stride)
    loader = Loader(splits, context.batch, seed=job.seed, rank=context.data_rank)
    metrics = load_metrics(job.metrics)
    sequences = _sequences_of_data(job, splits)
    num_sequences = (
        min(sequences.num_sequences, job.eval_sequences) if job.split == "held_out" else sequences.num_sequences
    )
    num_steps = job.repeats * sum(
        -(-each // context.batch.global_batch) for each in (num_sequences, *texts.num_windows)
    )
    steps, fastest_s = itertools.count(1), math.inf
    clock = StepClock(context.heartbeat, cuda=torch.cuda.is_available(), profiler=context.profiler)

    def progress() -> None:
        heartbeat("evaluate", next(steps), steps=num_steps)

    name = "data" if job.split == "all" else "held-out"
    with make_engine(context, clock) as engine:
        store = CheckpointStore(context.run_dir.checkpoints, context.run.checkpoint)
        restored = restore_checkpoint(store, context, engine, tokenizer=splits.tokenizer, check=check)
        done, sources = restored.step if restored else 0, SourceMetrics(splits, engine)
        with MetricsWriter(context.run_dir.metrics, start_step=done) if context.is_main else nullcontext() as writer:
            if writer is not None:
                writer.record(done, **{f"baseline/{name}": loss for name, loss in splits.baselines.items()})
            for _ in range(job.repeats):
                started = time.perf_counter()
                found = evaluate(
                    engine,
                    loader.in_order(sequences, num_sequences),
                    preempted=never_preempted,
                    metrics=metrics,
                    token_bytes=texts.token_bytes,
                    heartbeat=progress,
                    profiler=context.profiler,
                )
                elapsed_s = time.perf_counter() - started
                fastest_s = min(fastest_s, elapsed_s)
                of_sources = {
                    name: EvaluationResult(loss=loss, preempted=False, metrics={})
                    for name, loss in sources.held_out().items()
                }
                of_sets = texts.evaluate(engine, loader, heartbeat=progress, profiler=context.profiler)
                if writer is not None:
                    # engines may count a token several times
                    labels = [sequences.num_labels(at) for at in range(num_sequences)]
                    tokens, apart = sum(labels), {**of_sources, **of_sets}
                    _record(writer, name, done, found, apart, tokens=tokens, elapsed_s=elapsed_s, fastest_s=fastest_s)
                    num_tokens = {name: tokens, **sources.held_out_totals(labels), **texts.num_labels}
                    table = _table({name: found, **apart}, num_tokens)
                    write_atomic(context.run_dir.path / "evaluation.md", "# Evaluation\n\n" + table)
                    print(table, end="", flush=True)
    heartbeat("done", num_steps)


def _sequences_of_data(job: Evaluate, splits: Splits) -> Sequences:
    """Return what is evaluated of the run's own data."""
    if job.split == "held_out":
        return splits.held_out
    if splits.whole is None:
        why = "the data is no text but examples, of which a part is held out"
        raise ConfigError("job.split", job.split, why=why, fix="set job.split=held_out")
    prefix = None if splits.tokenizer is None else splits.tokenizer.end_id
    return TextWindows(stream=splits.whole, prefix=prefix, length=job.sequence_length, stride=job.window_stride)


def _record(
    writer: MetricsWriter,
    name: str,
    done: int,
    found: EvaluationResult,
    apart: Mapping[str, EvaluationResult],
    *,
    tokens: int,
    elapsed_s: float,
    fastest_s: float,
) -> None:
    measured = {**found.numbers, "tokens": tokens, **found.metrics, **set_metrics(apart)}
    writer.record(
        done,
        **{f"eval/{name}": value for name, value in measured.items()},
        **{
            "perf/tokens_per_s": tokens / fastest_s,
            "memory/peak_bytes": peak_memory_bytes(cuda=torch.cuda.is_available()),
            "time/evaluate_s": elapsed_s,
        },
    )
    losses = f"{name} loss {found.loss:.4f}  perplexity {found.perplexity:.2f}"
    losses += "".join(f"  {name} {value:.4f}" for name, value in found.metrics.items())
    print(f"{losses}  {tokens:,} tokens in {elapsed_s:.2f} s  {tokens / elapsed_s:,.0f} tokens/s", flush=True)


def _table(found: Mapping[str, EvaluationResult], num_tokens: Mapping[str, int]) -> str:
    """Return a Markdown table with a row for each text."""
    return "\n".join(_table_lines(found, num_tokens)) + "\n"


def _table_lines(found: Mapping[str, EvaluationResult], num_tokens: Mapping[str, int]) -> Iterator[str]:
    yield "| text | tokens | loss (nats a token) | perplexity | bits per byte |"
    yield "|---|---:|---:|---:|---:|"
    for name, each in found.items():
        bits = "" if each.bits_per_byte is None else f"{each.bits_per_byte:.4f}"
        yield f"| {name} | {num_tokens[name]:,} | {each.loss:.4f} | {each.perplexity:,.2f} | {bits} |"
