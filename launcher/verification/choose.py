"""Which strategies of the catalogue a run verifies, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.parallel.replicated import Single
from launcher.verification.case import Case
from launcher.verification.catalogue import CATALOGUE

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.jobs.verify import Verify

OWN = "run"
"""Name of the strategy that the run itself has: ``parallel`` and ``activation``."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is verified."""

    sequences: int
    """The global batch of all."""
    cases: dict[str, Case] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Name to the reason why it cannot be taken."""


def choose(job: Verify, run: Run, *, world_size: int) -> Choice:
    """Return the strategies that ``job.strategies`` names, sorted into those that fit and those that do not.

    Raises:
        ConfigError: the batch of the run does not come out even.
    """
    sequences = job.batch(run, world_size=world_size).global_
    choice = Choice(sequences=sequences)
    for name, case in _named(job, run).items():
        why = case.misfit(run, world_size=world_size, sequences=sequences)
        if why is None:
            choice.cases[name] = case
        else:
            choice.left_out[name] = why
    return choice


def _named(job: Verify, run: Run) -> dict[str, Case]:
    """Return what was asked for by name, or all there is, with the run's own strategy where it is another."""
    own = Case(run.parallel, activation=run.activation)
    if job.strategies == "auto":
        known = isinstance(run.parallel, Single) or any(
            case.parallel == own.parallel and case.activation in (None, own.activation) for case in CATALOGUE.values()
        )
        return CATALOGUE if known else {OWN: own, **CATALOGUE}
    everything = {OWN: own, **CATALOGUE}
    return {name: everything[name] for name in job.strategies}
