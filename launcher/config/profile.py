"""torch's profiler: which steps of a run are recorded.

Typed ``profile=true`` or ``profile=false``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.component import Component
from launcher.errors import ConfigError

ProfileUnit = Literal["steps", "engine steps", "time", "cases"]
"""Unit of a job's recording: its steps, engine steps, seconds, or benchmark cases.
Each case of a benchmark is run once more."""

_DEFAULT_ACTIVE_STEPS = {"steps": 2, "engine steps": 20}


@dataclass(frozen=True, kw_only=True)
class ProfileWindow:
    """Which steps are recorded, counted from 1 as one process takes them."""

    wait: int
    warmup: int
    active: int

    @property
    def first(self) -> int:
        """The first step that is recorded."""
        return self.wait + self.warmup + 1

    @property
    def last(self) -> int:
        """The last step that is recorded."""
        return self.wait + self.warmup + self.active


@dataclass(frozen=True, kw_only=True)
class Profile(Component):
    """Nothing is recorded."""

    group: ClassVar[str] = "profile"
    kind: ClassVar[str] = "false"

    def validate_steps(self, unit: ProfileUnit, num_steps: int) -> Iterator[ConfigError]:
        """Yield why a job of ``num_steps`` steps is too short for the window."""
        yield from ()

    def describe(self, unit: ProfileUnit) -> Iterator[tuple[str, str]]:
        """Yield a description of the recording."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class TorchProfile(Profile):
    """Record a few steps of every rank: Chrome trace, operator table and memory.

    The files are in the folder profile of the run.
    """

    kind: ClassVar[str] = "true"

    wait: int = 1
    """Steps before the profiler starts: the first one is slow and not typical."""

    warmup: int = 1
    """Warm-up steps whose results are discarded."""

    active: int | None = None
    """Steps to record; ``null`` records 2 of training or evaluation, 20 of an engine."""

    seconds: float = 20.0
    """Longest recording in seconds of a job without steps, from the start of the job or case."""

    memory: bool = True
    """Whether allocations are recorded too; on a GPU, with a snapshot of its memory."""

    shapes: bool = False
    """Whether operators with other input shapes get rows of their own."""

    top: int = 20
    """Number of operators in the table, by longest self time."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject windows that hold nothing."""
        yield from self.validate_minimum(0, "wait", "warmup")
        yield from self.validate_minimum(1, "active", "top")
        if self.seconds <= 0:
            yield self.error("seconds", "must be above 0", "set profile.seconds=20")

    def window(self, unit: ProfileUnit) -> ProfileWindow:
        """Return the steps that are recorded of a job that has steps."""
        active = _DEFAULT_ACTIVE_STEPS[unit] if self.active is None else self.active
        return ProfileWindow(wait=self.wait, warmup=self.warmup, active=active)

    def validate_steps(self, unit: ProfileUnit, num_steps: int) -> Iterator[ConfigError]:
        """Reject a window beyond the last step."""
        if unit != "steps":
            return
        window = self.window(unit)
        if window.last > num_steps:
            why = f"steps {window.first} to {window.last} would be recorded, and the run has {num_steps}"
            rest = num_steps - window.active - self.warmup
            fits = (
                f"profile.wait={rest}" if rest >= 0 else f"profile.wait=0 profile.warmup=0 profile.active={num_steps}"
            )
            yield self.error("wait", why, f"set {fits}")

    def describe(self, unit: ProfileUnit) -> Iterator[tuple[str, str]]:
        """Yield a description of the recording."""
        if unit in _DEFAULT_ACTIVE_STEPS:
            window = self.window(unit)
            what = f"{unit} {window.first} to {window.last} of each process, which are slower because of it"
        elif unit == "cases":
            what = f"each case once more, {self.seconds:g} s of it at most; not part of the results"
        else:
            what = f"the first {self.seconds:g} s"
        yield "profile", what
