"""Saving: how long training stands still, until when a checkpoint is on the disk, and how fast it is restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from launcher.benchmarks.base import Benchmark
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.benchmarks.results import Results
    from launcher.config import Run
    from launcher.context import Context

Way = Literal["none", "blocking", "asynchronous"]
NONE: Final[Way] = "none"

_COPIED = ("single", "ddp", "fsdp")
"""Strategies whose state can be copied by name and written beside the steps."""


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmark(Benchmark):
    """The same training loop without saving, and with each way to save, by the run's model and strategy.

    ``blocking`` is how job=train saves. ``asynchronous`` is torch.distributed.checkpoint's async_save of the same
    tensors: training stands still while they are copied, and a thread writes the copies.
    """

    kind: ClassVar[str] = "checkpoint"
    headline: ClassVar[tuple[str, ...]] = ("ways", "saves", "every", "micro_batch", "sequence")
    max_ranks: ClassVar[int | None] = None
    how: ClassVar[str] = "on forks of the run's ranks"
    needs_model: ClassVar[bool] = True

    ways: tuple[Way, ...] = ("none", "blocking", "asynchronous")
    """What is compared; how many seconds saves add to the loop is known only beside ``none``."""

    saves: int = 3
    """Saves in a loop, and a further one that is restored."""

    every: int = 4
    """Optimiser steps before each save, and after the last."""

    micro_batch: int = 2
    """Sequences of each rank in a step."""

    sequence: int = 64
    """Tokens in each of them."""

    case_timeout_s: float = 600.0
    """Time that one loop gets, from building the model to what is restored."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse loops without saves, and ways that are none or twice there."""
        yield from super().problems()
        yield from self.below(1, "saves", "every", "micro_batch", "case_timeout_s")
        yield from self.below(2, "sequence")
        if not self.ways or len(set(self.ways)) < len(self.ways):
            yield self.refuse("ways", "names nothing to compare, or something twice", "leave benchmark.ways out")
        elif self.ways == (NONE,):
            yield self.refuse("ways", "saves nothing", "leave benchmark.ways out")

    @property
    def train_options(self) -> Mapping[str, Any]:
        """The loop."""
        steps = self.warmup + self.every * (self.saves + 2)
        return {"micro_batch": self.micro_batch, "sequence_length": self.sequence, "steps": steps}

    def refusals(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Refuse strategies whose state only DeepSpeed can write, and sequences that the model does not take."""
        kind, shape = run.parallel.kind, run.model.shape()
        if "asynchronous" in self.ways and kind not in _COPIED:
            why = f"parallel={kind} has no tensors by name that could be copied while it trains"
            yield self.refuse("ways", why, f"set benchmark.ways=[none,blocking], or parallel={' or '.join(_COPIED)}")
        if shape is None:
            why = "its sizes are known only once it is downloaded"
            yield ConfigError("model", run.model.kind, why=why, fix="choose another model")
        elif self.sequence > shape.context:
            why = f"{run.model.name} takes at most {shape.context} tokens"
            yield self.refuse("sequence", why, f"set benchmark.sequence={shape.context}")
        yield from run.parallel.batch_refusals(run.batched_job.batch(run, world_size=world_size))

    @property
    def num_measurements(self) -> int:
        """Each way in each round."""
        return self.repeats * len(self.ways)

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the loop."""
        yield "model", f"{run.model.name}, parallel={run.parallel.kind}, precision={run.precision.kind}"
        steps = self.every * (self.saves + 1)
        yield "loop", f"{steps} steps, a save after every {self.every} of them but the last"
        yield "compared", ", ".join(self.ways)

    def run(self, context: Context) -> Results | None:
        """Train in each way in turn, on all ranks."""
        from launcher.benchmarks.ranked import RankedCase, take_in_turn
        from launcher.benchmarks.report_of_saving import fold, report
        from launcher.benchmarks.saving import train_and_save
        from launcher.verification.preload import preload

        loop = partial(train_and_save, every=self.every, saves=self.saves, warmup=self.warmup)
        cases: dict[str, RankedCase] = {
            way: RankedCase(run=context.run, world_size=context.world_size, work=partial(loop, way=way), fold=fold)
            for way in self.ways
        }
        preload(context, deepspeed=context.run.parallel.engine == "deepspeed")
        found = take_in_turn(cases, repeats=self.repeats, limit_s=self.case_timeout_s, context=context)
        return report(self, found) if context.is_main else None
