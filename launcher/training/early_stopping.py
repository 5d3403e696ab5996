"""Stop a run whose evaluations no longer improve."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.checkpoint.manifest import CheckpointManifest
    from launcher.config.job.train import Train
    from launcher.training.evaluation import EvaluationResult


class EarlyStopping:
    """Counts evaluations without a better metric, the same on every rank.

    Args:
        job: says how many end the run, and how much better counts.
        best_metric: ``checkpoint.best_metric``: ``min:NAME`` or ``max:NAME``.
    """

    def __init__(self, job: Train, *, best_metric: str) -> None:
        direction, _, self._name = best_metric.partition(":")
        self._sign, self._job = 1.0 if direction == "min" else -1.0, job
        self.best: float | None = None
        """The best value so far, before which nothing counts as better."""
        self.num_stale = 0
        """Evaluations since then."""

    @property
    def is_over(self) -> bool:
        """Whether the run has to end."""
        patience = self._job.early_stopping_patience
        return patience is not None and self.num_stale >= patience

    def observe(self, result: EvaluationResult) -> None:
        """Count an evaluation; one that did not measure the metric does not count."""
        value = result.loss if self._name == "loss" else result.metrics.get(self._name)
        if self._job.early_stopping_patience is None or value is None:
            return
        threshold = self._job.early_stopping_threshold
        is_first = self.best is None and math.isfinite(value)
        if is_first or (self.best is not None and self._sign * value < self._sign * self.best - threshold):
            self.best, self.num_stale = value, 0
        else:  # NaN is not better, and nothing to compare later values with
            self.num_stale += 1

    def restore(self, manifest: CheckpointManifest) -> None:
        """Continue counting from a checkpoint."""
        if self._job.early_stopping_patience is not None:
            self.best, self.num_stale = manifest.best_value, manifest.stale_evaluations

    def __str__(self) -> str:
        times = "evaluation" if self.num_stale == 1 else "evaluations"
        known = "a finite eval/" if self.best is None else "an eval/"
        better = "" if self.best is None else f" better than {self.best:.4f}"
        return f"{self.num_stale} {times} without {known}{self._name}{better}"
