"""The loss of each source of a mixture, of steps and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.data.rows import ExampleRows, PairRows
from launcher.engines.source_losses import SourceLosses
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.data.dataset import Splits
    from launcher.engines.base import Engine


class SourceMetrics:
    """Names what an engine adds up of each source; does nothing unless the data has several.

    Args:
        splits: of the run's data.
        engine: adds up losses from now on.
    """

    def __init__(self, splits: Splits, engine: Engine) -> None:
        self._splits = splits
        self._losses: SourceLosses | None = None
        if num_sources := max(len(splits.train_sources), len(splits.held_out_sources)):
            self._losses = SourceLosses(num_sources, device=engine.device)
            engine.add_losses_to(self._losses)

    def train(self) -> dict[str, float]:
        """Return the losses of the step that was taken, by the name of the source.

        All ranks call it together, once after each step. Sources without a token in the step are left out.
        """
        return self._take(self._splits.train_sources)

    def held_out(self) -> dict[str, float]:
        """Return the losses of the evaluation that was made, as :meth:`train` does of a step."""
        return self._take(self._splits.held_out_sources)

    def _take(self, names: Sequence[str]) -> dict[str, float]:
        if self._losses is None:
            return {}
        losses = self._losses.take()[: len(names)]
        return {name: loss for name, loss in zip(names, losses, strict=True) if loss is not None}

    def held_out_totals(self, values: Sequence[int]) -> dict[str, int]:
        """Return the sum of a value over the first held-out sequences of each source.

        Args:
            values: of the first sequences.
        """
        names, rows = self._splits.held_out_sources, self._splits.held_out
        totals = dict.fromkeys(names, 0)
        if names and isinstance(rows, ExampleRows | PairRows):
            for number, value in enumerate(values):
                totals[names[rows.source(number)]] += value
        return totals

    def check_measured(self, metric: str, *, num_sequences: int) -> None:
        """Raise if a metric is the loss of a source, and evaluations hold no sequence of it.

        Args:
            metric: ``min:NAME`` or ``max:NAME``.
            num_sequences: of an evaluation.

        Raises:
            ConfigError: it would never be measured.
        """
        names, rows = self._splits.held_out_sources, self._splits.held_out
        name = metric.partition(":")[2].removesuffix("/loss")
        if name not in names or not isinstance(rows, ExampleRows | PairRows):
            return
        count = min(num_sequences, rows.num_sequences)
        if names.index(name) not in {rows.source(number) for number in range(count)}:
            why = f"none of the {count} sequences of an evaluation is of {name}"
            raise ConfigError("checkpoint.best_metric", metric, why=why, fix="raise job.eval_sequences")
