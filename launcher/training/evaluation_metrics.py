"""Metrics of plugins over the held-out tokens, summed over batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigError
from launcher.plugins.base import METRIC
from launcher.plugins.calls import named_in_errors
from launcher.plugins.loading import executor

if TYPE_CHECKING:
    from torch import Tensor

EvaluationMetric = Callable[["Tensor", "Tensor"], Any]
"""From logits and labels to a sum and what it is divided by.

Logits are (sequences, tokens, vocabulary), labels (sequences, tokens), ``IGNORE_INDEX`` where none counts. A rank may
have a part of each sequence only."""


def load_metrics(names: Sequence[str]) -> dict[str, EvaluationMetric]:
    """Return the functions of ``job.metrics`` by name."""
    metrics = {}
    for name in names:
        with named_in_errors(METRIC, name):
            metrics[name] = executor(METRIC, name, {})
    return metrics


class MetricSums:
    """Sums of one rank over the batches of one evaluation.

    Args:
        metrics: by name.
    """

    def __init__(self, metrics: Mapping[str, EvaluationMetric]) -> None:
        self._metrics = metrics
        self._sums = dict.fromkeys(metrics, (0.0, 0.0))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Raises:
            JobError: a metric returned something else than a sum and a count.
            PluginError: a metric raised an exception.
        """
        for name, metric in self._metrics.items():
            with named_in_errors(METRIC, name):
                added = _pair(name, metric(logits, labels))
            total, count = self._sums[name]
            self._sums[name] = (total + added[0], count + added[1])

    def values(self) -> list[float]:
        """Return sum and count of each metric, one after the other."""
        return [number for pair in self._sums.values() for number in pair]

    def means(self, summed: Sequence[float]) -> dict[str, float]:
        """Return each metric from ``values`` summed over ranks; NaN where it counted nothing."""
        pairs = zip(summed[::2], summed[1::2], strict=True)
        return {
            name: total / count if count else math.nan for name, (total, count) in zip(self._sums, pairs, strict=True)
        }


def _pair(name: str, returned: Any) -> tuple[float, float]:
    try:
        total, count = returned
        return float(total), float(count)
    except (TypeError, ValueError, RuntimeError):
        why = f"returned {type(returned).__name__}, and not a sum and a count"
        raise ConfigError(
            "job.metrics", name, why=why, fix="return two numbers: their sums over batches and ranks are divided"
        ) from None
