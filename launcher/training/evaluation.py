"""Held-out loss over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.profiling.base import NO_PROFILER, Profiler

if TYPE_CHECKING:
    from launcher.data.loader import Loader
    from launcher.engines.base import Engine


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One evaluation, the same on every rank."""

    loss: float
    """Mean per token, in nats."""
    preempted: bool
    """Some rank had been asked to leave by its end."""


def evaluate(
    engine: Engine,
    loader: Loader,
    num_sequences: int,
    *,
    preempted: Callable[[], bool],
    beat: Callable[[], None] = lambda: None,
    profiler: Profiler = NO_PROFILER,
) -> HeldOut:
    """Measure the loss over the first ``num_sequences`` held-out sequences.

    Every rank takes equally many batches, because a partitioned model needs all ranks in every forward pass; the
    batches that fill up carry no labels. ``beat`` is called before each global batch, which is a step of ``profiler``.
    """
    from launcher.engines.distributed import sum_over_ranks

    loss_sum, tokens = 0.0, 0
    for micro_batches in loader.held_out(num_sequences):
        beat()
        with profiler.step():
            batch_sum, batch_tokens = engine.loss_of(micro_batches)
        loss_sum += batch_sum
        tokens += batch_tokens
    total, count, num_preempted = sum_over_ranks([loss_sum, float(tokens), float(preempted())], device=engine.device)
    assert count, "an evaluation without a single token"
    return HeldOut(loss=total / count, preempted=num_preempted > 0)
