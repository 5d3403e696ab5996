"""Callbacks of plugins: called on every rank after a step, evaluation or checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.plugins.base import CALLBACK
from launcher.plugins.loading import executor

if TYPE_CHECKING:
    from launcher.engines.base import Engine, StepResult
    from launcher.engines.context import Context

NO_METRICS: Mapping[str, float] = {}


class Callback:
    """Does nothing; a plugin overrides what it needs.

    Every method is called by all ranks together, so it may use collectives. What it returns is written to metrics.jsonl
    beside the step, by rank 0; names begin with ``callback/`` there. An exception ends the run.

    Args:
        context: of this rank: run, run directory, rank.
        engine: the model and its optimizer.
    """

    def __init__(self, context: Context, engine: Engine) -> None:
        self.context, self.engine = context, engine

    def on_step(self, step: int, result: StepResult) -> Mapping[str, float]:
        """Return metrics after optimizer step ``step`` (1 is the first)."""
        return NO_METRICS

    def on_evaluate(self, step: int, loss: float) -> Mapping[str, float]:
        """Return metrics after an evaluation; ``loss`` is held-out, in nats a token."""
        return NO_METRICS

    def on_save(self, step: int, folder: Path) -> Mapping[str, float]:
        """Return metrics after a checkpoint was written to ``folder``, whole."""
        return NO_METRICS


class Callbacks(Callback):
    """Those that a run names, called in their order.

    Args:
        names: of ``job.callbacks``.
        context: of this rank.
        engine: of this rank.
    """

    def __init__(self, names: Iterable[str], context: Context, engine: Engine) -> None:
        super().__init__(context, engine)
        self._all: list[Callback] = [executor(CALLBACK, name, {})(context, engine) for name in names]

    def on_step(self, step: int, result: StepResult) -> Mapping[str, float]:
        """Return the metrics of all."""
        return _merged(each.on_step(step, result) for each in self._all)

    def on_evaluate(self, step: int, loss: float) -> Mapping[str, float]:
        """Return the metrics of all."""
        return _merged(each.on_evaluate(step, loss) for each in self._all)

    def on_save(self, step: int, folder: Path) -> Mapping[str, float]:
        """Return the metrics of all."""
        return _merged(each.on_save(step, folder) for each in self._all)


def _merged(several: Iterable[Mapping[str, float] | None]) -> Mapping[str, float]:
    return {f"callback/{name}": value for metrics in several for name, value in (metrics or {}).items()}
