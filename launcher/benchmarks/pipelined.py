"""One pipeline to measure: what its stages do, how many there are, and in which order they do it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.benchmarks.bubble import formula
from launcher.parallel.pipeline import Pipeline, ScheduleName, micro_batch_choices

Pass = Literal["sleep", "model"]
Work = Literal["train", "infer"]

FORWARD: ScheduleName = "gpipe"
"""Forward passes alone go through stages in one order whatever the schedule: stretches are laid out as under GPipe."""


@dataclass(frozen=True, kw_only=True)
class Pipelined:
    """One pipeline at one kind of work; one stage is the process that it is compared with."""

    passes: Pass
    work: Work
    schedule: ScheduleName
    stages: int
    micro_batches: int

    @property
    def name(self) -> str:
        """What the case is called: in metrics, tables and files."""
        parts = [self.passes, self.work, *([self.schedule] if self.schedules else [])]
        return "_".join([*parts, f"{self.stages}_stages" if self.stages > 1 else "one_stage", f"{self.micro_batches}"])

    @property
    def schedules(self) -> bool:
        """Whether its schedule has a say."""
        return self.work == "train" and self.stages > 1

    @property
    def in_words(self) -> str:
        """What it is, for people."""
        what = self.schedule if self.schedules else ("forward passes" if self.work == "infer" else "training")
        stages = f"{self.stages} stages" if self.stages > 1 else "one stage"
        return f"{what}, {stages}, {self.micro_batches} micro-batches"

    @property
    def chunks(self) -> int:
        """Stretches of layers on each rank."""
        return Pipeline(schedule=self.schedule).num_chunks

    @property
    def formula(self) -> float | None:
        """Idle share by the formula; ``None`` where too few micro-batches fill the pipeline for it to hold."""
        return formula(self.schedule, ranks=self.stages, micro_batches=self.micro_batches, chunks=self.chunks)

    @property
    def misfit(self) -> str | None:
        """Why the schedule does not take so many micro-batches, or ``None`` where it does."""
        fitting = micro_batch_choices(self.schedule, stages=self.stages, wanted=self.micro_batches)
        if self.micro_batches in fitting:
            return None
        return f"the schedule takes {' or '.join(map(str, fitting))} micro-batches there"


def baselines(work: Work, micro_batches: tuple[int, ...]) -> Iterator[Pipelined]:
    """Yield one process at the same work, in as many micro-batches."""
    for number in micro_batches:
        yield Pipelined(passes="model", work=work, schedule=FORWARD, stages=1, micro_batches=number)
