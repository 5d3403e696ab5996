"""Compare strategies with one process: the same steps from the same weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from launcher.errors import ConfigError
from launcher.jobs.base import LearningJob
from launcher.models.attending import dropouts
from launcher.precision import Fp32
from launcher.suggest import did_you_mean
from launcher.verification.case import REFERENCE
from launcher.verification.catalogue import CATALOGUE
from launcher.verification.choose import OWN, choose

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.context import Context


@dataclass(frozen=True, kw_only=True)
class Verify(LearningJob):
    """The same few optimiser steps under many strategies, and how far each strays from one process."""

    kind: ClassVar[str] = "verify"

    steps: int = 10
    """Optimiser steps that every strategy takes."""

    strategies: Literal["auto"] | tuple[str, ...] = "auto"
    """Names from the catalogue that the plan prints, ``run`` for the run's own; ``auto`` takes all that fit."""

    loss_tolerance: float = 1e-5
    """Largest relative difference in loss, at any step: sums in another order round differently."""

    grad_norm_tolerance: float = 1e-4
    """Largest relative difference in gradient norm, at any step: there Adam has magnified those of the weights."""

    generated_tokens: int = 8
    """Tokens that each strategy generates greedily after its steps; all must be equal."""

    case_timeout_s: float = 300.0
    """Time that one strategy gets, from building the model to its last token."""

    perturb: float = 0.0
    """Multiply the learning rate of all but one process by 1 + this, to see the comparison fail."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse names that are in no catalogue, and counts that compare nothing."""
        yield from super().problems()
        yield from self.below(1, "generated_tokens", "case_timeout_s")
        yield from self.below(0, "loss_tolerance", "grad_norm_tolerance")
        if self.strategies == "auto":
            return
        if not self.strategies:
            yield self.refuse("strategies", "names nothing to compare", "set job.strategies=auto")
        for name in self.strategies:
            if name not in (OWN, *CATALOGUE):
                why, fix = f"there is no strategy {name} here", did_you_mean(name, (OWN, *CATALOGUE))
                yield self.refuse("strategies", why, fix)

    def refusals(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Refuse what makes equal strategies differ, and strategies asked for by name that cannot be taken."""
        if not isinstance(run.precision, Fp32):
            why = "only fp32 agrees to the tolerances of job=verify"
            yield ConfigError("precision", run.precision.kind, why=why, fix="set precision=fp32")
        if getattr(run.model, "dropout", 0.0):
            why = "ranks draw dropout each for itself, so no two strategies agree"
            yield ConfigError("model.dropout", run.model.dropout, why=why, fix="set model.dropout=0")  # type: ignore[attr-defined]
        for key, value in dropouts(run.model.stored_config() or {}).items():
            why = f"its config.json sets {key}={value:g}, and ranks draw dropout each for itself"
            fix = f"set {key} to 0 in a copy of the folder"
            yield ConfigError("model.name", run.model.name, why=why, fix=fix)
        if run.profile.kind == "true":
            why = "job=verify computes in processes that end after a few steps"
            yield ConfigError("profile", "true", why=why, fix="profile job=train with the strategy in question")
        try:
            choice = choose(self, run, world_size=world_size)
        except ConfigError:
            return  # the batch does not come out even, which the plan refuses
        left_out = choice.left_out if self.strategies != "auto" or not choice.cases else {}
        for name, why in left_out.items():
            yield self.refuse("strategies", f"{name}: {why}", "leave it out, or set job.strategies=auto")

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the steps of one process and of all strategies."""
        return self.steps * (1 + len(choose(self, run, world_size=world_size).cases))

    def outline(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield one process and the strategies that are compared with it."""
        choice = choose(self, run, world_size=world_size)
        yield "reference", REFERENCE.describe(run, world_size=1, sequences=choice.sequences)
        for name, case in choice.cases.items():
            yield name, case.describe(run, world_size=world_size, sequences=choice.sequences)

    def notes(self, run: Run, *, world_size: int) -> Iterator[str]:
        """Say what is left out and why."""
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, why in choose(self, run, world_size=world_size).left_out.items():
            by_reason[why].append(name)
        for why, names in by_reason.items():
            yield f"not verified: {', '.join(names)}: {why}"
        if self.perturb:
            yield f"job.perturb={self.perturb:g}: every comparison is meant to fail"

    def files(self) -> Iterator[str]:
        """Yield the comparison, for programs and for people."""
        yield from ("verify.json", "verify.md")

    def run(self, context: Context) -> None:
        """Take part in every strategy on this rank."""
        from launcher.verification.verify import verify

        verify(self, context)
