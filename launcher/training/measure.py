"""Measure a model under any strategy: the work of the job ``evaluate``."""

from __future__ import annotations

import itertools
import math
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from launcher.checkpoint.store import CheckpointStore
from launcher.data.loader import Loader
from launcher.data.open import open_splits
from launcher.engines import make_engine
from launcher.engines.base import nobody_asks
from launcher.training.clock import Clock
from launcher.training.evaluation import evaluate
from launcher.training.memory import peak_bytes
from launcher.training.metrics import MetricsWriter
from launcher.training.resume import restore

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.jobs.evaluate import Evaluate


def measure(job: Evaluate, context: Context) -> None:
    """Go through the held-out sequences ``job.repeats`` times, on every rank; rank 0 records and prints each time."""
    beat = context.heartbeat.beat
    splits = open_splits(
        context.run.data,
        context.run.model,
        sequence_length=job.sequence_length,
        seed=job.seed,
        beat=lambda: beat("load"),
    )
    num_sequences = min(job.eval_sequences, splits.held_out.num_sequences)
    loader = Loader(splits, context.batch, seed=job.seed, rank=context.data_rank)
    num_steps = job.num_steps(context.run, world_size=context.world_size)
    steps, fastest_s = itertools.count(1), math.inf
    clock = Clock(context.heartbeat, cuda=torch.cuda.is_available(), profiler=context.profiler)
    with make_engine(context, clock) as engine:
        done = restore(CheckpointStore(context.run_dir.checkpoints, context.run.checkpoint), context, engine)
        with MetricsWriter(context.run_dir.metrics, start_step=done) if context.is_main else nullcontext() as writer:
            if writer is not None:
                writer.record(done, **{f"baseline/{name}": loss for name, loss in splits.baselines.items()})
            for _ in range(job.repeats):
                started = time.perf_counter()
                loss = evaluate(
                    engine,
                    loader,
                    num_sequences,
                    preempted=nobody_asks,
                    beat=lambda: beat("evaluate", next(steps), steps=num_steps),
                    profiler=context.profiler,
                ).loss
                elapsed_s = time.perf_counter() - started
                fastest_s = min(fastest_s, elapsed_s)
                if writer is not None:
                    tokens = num_sequences * job.sequence_length  # engines may count one several times
                    _record(writer, done, loss, tokens=tokens, elapsed_s=elapsed_s, fastest_s=fastest_s)
    beat("done", num_steps)


def _record(writer: MetricsWriter, done: int, loss: float, *, tokens: int, elapsed_s: float, fastest_s: float) -> None:
    writer.record(
        done,
        **{
            "eval/loss": loss,
            "eval/perplexity": perplexity(loss),
            "eval/tokens": tokens,
            "perf/tokens_per_s": tokens / fastest_s,
            "memory/peak_bytes": peak_bytes(cuda=torch.cuda.is_available()),
            "time/evaluate_s": elapsed_s,
        },
    )
    told = f"held-out loss {loss:.4f}  perplexity {perplexity(loss):.2f}"
    print(f"{told}  {tokens:,} tokens in {elapsed_s:.2f} s  {tokens / elapsed_s:,.0f} tokens/s", flush=True)


def perplexity(loss: float) -> float:
    """Return e to the loss, infinite where that is more than a float holds."""
    return math.exp(loss) if loss < 700 else math.inf
