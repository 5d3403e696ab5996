"""Held-out loss over all ranks: during training, and as the job evaluate."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.checkpoint.store import CheckpointStore
from launcher.data.dataloader import Loader
from launcher.data.dataset import open_splits
from launcher.engines.base import make_engine, never_preempted
from launcher.profiling.performance import StepClock, peak_memory_bytes
from launcher.profiling.profiler import NO_PROFILER, Profiler
from launcher.protocol.metrics import MetricsWriter
from launcher.training.checkpointing import resolve_tokenizer, restore_checkpoint
from launcher.training.evaluation_metrics import EvaluationMetric, MetricSums, load_metrics

if TYPE_CHECKING:
    from launcher.config.job.train import Evaluate
    from launcher.engines.base import Engine
    from launcher.engines.context import Context


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One evaluation, the same on every rank."""

    loss: float
    """Mean per token, in nats."""
    preempted: bool
    """Some rank had been asked to leave by its end."""
    metrics: Mapping[str, float]
    """Metrics of plugins, each the mean of what it counts."""


def evaluate(
    engine: Engine,
    loader: Loader,
    num_sequences: int,
    *,
    preempted: Callable[[], bool],
    metrics: Mapping[str, EvaluationMetric],
    heartbeat: Callable[[], None] = lambda: None,
    profiler: Profiler = NO_PROFILER,
) -> EvaluationResult:
    """Measure the loss over the first ``num_sequences`` held-out sequences.

    Every rank takes equally many batches, because a partitioned model needs all ranks in every forward pass; the
    batches that fill up carry no labels. ``heartbeat`` is called before each global batch, which is a step of
    ``profiler``.

    Args:
        engine: computes the loss.
        loader: of the batches.
        num_sequences: over all ranks.
        preempted: whether this rank has been asked to leave.
        metrics: of plugins, by name.
        heartbeat: called before each global batch.
        profiler: of this rank.
    """
    from launcher.engines.distributed import sum_over_ranks

    loss_sum, tokens, sums = 0.0, 0, MetricSums(metrics)
    for micro_batches in loader.held_out(num_sequences):
        heartbeat()
        with profiler.step():
            batch_sum, batch_tokens = engine.loss_of(micro_batches, observe=sums.add if metrics else None)
        loss_sum += batch_sum
        tokens += batch_tokens
    own = [loss_sum, float(tokens), float(preempted()), *sums.values()]
    total, count, num_preempted, *summed = sum_over_ranks(own, device=engine.device)
    assert count, "an evaluation without a single token"
    return EvaluationResult(loss=total / count, preempted=num_preempted > 0, metrics=sums.means(summed))


def run_evaluation(job: Evaluate, context: Context) -> None:
    """Evaluate on the held-out sequences ``job.repeats`` times; rank 0 records each result."""
    heartbeat = context.heartbeat.update
    splits = open_splits(
        resolve_tokenizer(context, context.run.data),
        context.run.model,
        sequence_length=job.sequence_length,
        seed=job.seed,
        heartbeat=lambda: heartbeat("load"),
    )
    num_sequences = min(job.eval_sequences, splits.held_out.num_sequences)
    loader = Loader(splits, context.batch, seed=job.seed, rank=context.data_rank)
    metrics = load_metrics(job.metrics)
    num_steps = job.num_steps(context.run, world_size=context.world_size)
    steps, fastest_s = itertools.count(1), math.inf
    clock = StepClock(context.heartbeat, cuda=torch.cuda.is_available(), profiler=context.profiler)
    with make_engine(context, clock) as engine:
        store = CheckpointStore(context.run_dir.checkpoints, context.run.checkpoint)
        restored = restore_checkpoint(store, context, engine, tokenizer=splits.tokenizer)
        done = restored.step if restored else 0
        with MetricsWriter(context.run_dir.metrics, start_step=done) if context.is_main else nullcontext() as writer:
            if writer is not None:
                writer.record(done, **{f"baseline/{name}": loss for name, loss in splits.baselines.items()})
            for _ in range(job.repeats):
                started = time.perf_counter()
                found = evaluate(
                    engine,
                    loader,
                    num_sequences,
                    preempted=never_preempted,
                    metrics=metrics,
                    heartbeat=lambda: heartbeat("evaluate", next(steps), steps=num_steps),
                    profiler=context.profiler,
                )
                elapsed_s = time.perf_counter() - started
                fastest_s = min(fastest_s, elapsed_s)
                if writer is not None:
                    tokens = loader.held_out_labels(num_sequences)  # engines may count one several times
                    _record(writer, done, found, tokens=tokens, elapsed_s=elapsed_s, fastest_s=fastest_s)
    heartbeat("done", num_steps)


def _record(
    writer: MetricsWriter, done: int, found: EvaluationResult, *, tokens: int, elapsed_s: float, fastest_s: float
) -> None:
    loss = found.loss
    writer.record(
        done,
        **{
            "eval/loss": loss,
            "eval/perplexity": perplexity(loss),
            "eval/tokens": tokens,
            **{f"eval/{name}": value for name, value in found.metrics.items()},
            "perf/tokens_per_s": tokens / fastest_s,
            "memory/peak_bytes": peak_memory_bytes(cuda=torch.cuda.is_available()),
            "time/evaluate_s": elapsed_s,
        },
    )
    losses = f"held-out loss {loss:.4f}  perplexity {perplexity(loss):.2f}"
    losses += "".join(f"  {name} {value:.4f}" for name, value in found.metrics.items())
    print(f"{losses}  {tokens:,} tokens in {elapsed_s:.2f} s  {tokens / elapsed_s:,.0f} tokens/s", flush=True)


def perplexity(loss: float) -> float:
    """Return e to the loss, infinite where that is more than a float holds."""
    return math.exp(loss) if loss < 700 else math.inf
