"""The loss of evaluation batches over all ranks, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from launcher.data.rows import IGNORE_INDEX
from launcher.profiling.profiler import NO_PROFILER, Profiler
from launcher.training.evaluation_metrics import EvaluationMetric, MetricSums

if TYPE_CHECKING:
    import numpy as np

    from launcher.data.dataloader import MicroBatch
    from launcher.engines.base import Engine


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One evaluation, the same on every rank."""

    loss: float
    """Mean per token, in nats."""
    preempted: bool
    """Some rank had been asked to leave by its end."""
    metrics: Mapping[str, float]
    """Metrics of plugins, each the mean of what it counts."""
    bytes_per_token: float = 0.0
    """Mean bytes of text that a counted token stands for; 0 if tokens stand for no text."""

    @property
    def perplexity(self) -> float:
        """Return e to the loss, infinite where that is more than a float holds."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte of text: loss / ln 2 / bytes a token; ``None`` without text.

        Equal for equal text whatever the tokenizer, so that models with different ones compare (The Pile,
        arXiv:2101.00027, section 3.1).
        """
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    @property
    def numbers(self) -> dict[str, float]:
        """Loss, perplexity and bits per byte by name."""
        bits = {} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}
        return {"loss": self.loss, "perplexity": self.perplexity, **bits}


def evaluate(
    engine: Engine,
    batches: Iterable[list[MicroBatch]],
    *,
    preempted: Callable[[], bool],
    metrics: Mapping[str, EvaluationMetric] = MappingProxyType({}),
    token_bytes: np.ndarray | None = None,
    heartbeat: Callable[[], None] = lambda: None,
    profiler: Profiler = NO_PROFILER,
) -> EvaluationResult:
    """Measure the loss over the labelled tokens of evaluation batches.

    Every rank takes equally many batches, because a partitioned model needs all ranks in every forward pass; the
    batches that fill up carry no labels. ``heartbeat`` is called before each global batch, which is a step of
    ``profiler``.

    Args:
        engine: computes the loss.
        batches: this rank's share, as ``Loader.in_order`` yields it.
        preempted: whether this rank has been asked to leave.
        metrics: of plugins, by name.
        token_bytes: bytes of text of each token, for bits per byte; ``None`` if tokens stand for no text.
        heartbeat: called before each global batch.
        profiler: of this rank.
    """
    from launcher.engines.distributed import sum_over_ranks

    loss_sum, tokens, sums = 0.0, 0, MetricSums(metrics)
    num_bytes, num_labels = 0, 0
    for micro_batches in batches:
        heartbeat()
        with profiler.step():
            batch_sum, batch_tokens = engine.loss_of(micro_batches, observe=sums.add if metrics else None)
        loss_sum += batch_sum
        tokens += batch_tokens
        for micro_batch in micro_batches:
            labels = micro_batch.labels.numpy()
            counted = labels[labels != IGNORE_INDEX]
            num_labels += len(counted)
            num_bytes += 0 if token_bytes is None else int(token_bytes[counted].sum())
    own = [loss_sum, float(tokens), float(preempted()), float(num_bytes), float(num_labels), *sums.values()]
    total, count, num_preempted, text_bytes, labels_of_ranks, *summed = sum_over_ranks(own, device=engine.device)
    assert count, "an evaluation without a single token"
    return EvaluationResult(
        loss=total / count,
        preempted=num_preempted > 0,
        metrics=sums.means(summed),
        bytes_per_token=text_bytes / labels_of_ranks,  # ranks that share a sample count it equally often
    )


def perplexity(loss: float) -> float:
    """Return e to the loss, infinite where that is more than a float holds."""
    return math.exp(loss) if loss < 700 else math.inf
