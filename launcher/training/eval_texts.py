"""The named texts of ``job.eval_sets`` on a rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from launcher.config.data.base import Corpus
from launcher.data.evaluation import open_eval_sets, token_bytes
from launcher.engines.base import never_preempted
from launcher.profiling.profiler import NO_PROFILER, Profiler
from launcher.training.checkpointing import resolve_tokenizer
from launcher.training.evaluation import EvaluationResult, evaluate

if TYPE_CHECKING:
    import numpy as np

    from launcher.data.dataloader import Loader
    from launcher.data.dataset import Splits
    from launcher.data.evaluation import EvalSet
    from launcher.engines.base import Engine
    from launcher.engines.context import Context


class EvalTexts:
    """Named texts that a run evaluates beside its own data, and the bytes of its tokens.

    Args:
        sets: paths by name.
        context: of this rank.
        splits: of the run's data.
        stride: tokens between the starts of two windows.
        most: windows of each text that are evaluated; ``None`` for all.
    """

    def __init__(
        self,
        sets: Mapping[str, str | tuple[str, ...]] | None,
        context: Context,
        splits: Splits,
        *,
        stride: int,
        most: int | None = None,
    ) -> None:
        self._tokenizer, self._most = splits.tokenizer, most
        self._sets: list[EvalSet] = []
        if sets:
            data = resolve_tokenizer(context, context.run.data)
            assert isinstance(data, Corpus), "refused before anything starts"
            assert splits.tokenizer is not None, "a corpus has a tokenizer"
            self._sets = open_eval_sets(
                data,
                context.run.model,
                sets,
                tokenizer=splits.tokenizer,
                length=context.run.batched_job.sequence_length,
                stride=stride,
                heartbeat=lambda: context.heartbeat.update("load"),
            )

    @functools.cached_property
    def token_bytes(self) -> np.ndarray | None:
        """Bytes of text of each token; ``None`` if tokens stand for no text."""
        return None if self._tokenizer is None else token_bytes(self._tokenizer)

    @property
    def num_windows(self) -> list[int]:
        """How many windows of each text are evaluated."""
        return [self._windows(each) for each in self._sets]

    @property
    def num_labels(self) -> dict[str, int]:
        """How many tokens of each text count, where all do."""
        return {each.name: each.windows.num_counted for each in self._sets}

    def evaluate(
        self,
        engine: Engine,
        loader: Loader,
        *,
        preempted: Callable[[], bool] = never_preempted,
        heartbeat: Callable[[], None] = lambda: None,
        profiler: Profiler = NO_PROFILER,
    ) -> dict[str, EvaluationResult]:
        """Measure each text; all ranks call it together.

        Args:
            engine: computes the loss.
            loader: divides the windows over ranks.
            preempted: whether this rank has been asked to leave.
            heartbeat: called before each global batch, which is a step of ``profiler``.
            profiler: of this rank.
        """
        return {
            each.name: evaluate(
                engine,
                loader.in_order(each.windows, self._windows(each)),
                preempted=preempted,
                token_bytes=self.token_bytes,
                heartbeat=heartbeat,
                profiler=profiler,
            )
            for each in self._sets
        }

    def _windows(self, each: EvalSet) -> int:
        available = each.windows.num_sequences
        return available if self._most is None else min(self._most, available)


def set_metrics(found: Mapping[str, EvaluationResult]) -> dict[str, float]:
    """Return what was measured of each text as metrics: ``wiki/loss`` and so on."""
    return {f"{name}/{key}": value for name, of_set in found.items() for key, value in of_set.numbers.items()}
