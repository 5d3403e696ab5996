"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule(Component):
    """A factor on the learning rate for each step, after a linear warm-up."""

    group: ClassVar[str] = "schedule"

    warmup_steps: int = 0
    """Steps over which the factor rises linearly from 1/(n+1) of the peak towards it."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a negative warm-up."""
        yield from self.validate_minimum(0, "warmup_steps")

    def factor(self, step: int, steps: int) -> float:
        """Return the multiplier of the peak rate for optimizer step ``step`` (0-based) of ``steps``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        span = max(1, steps - self.warmup_steps)
        return self.decay(min(1.0, (step - self.warmup_steps) / span))

    @abstractmethod
    def decay(self, progress: float) -> float:
        """Return the multiplier after warm-up, for progress in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(Schedule):
    """The peak rate throughout."""

    kind: ClassVar[str] = "constant"

    def decay(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class _DecayingSchedule(Schedule):
    final_factor: float = 0.1
    """The multiplier that the last step approaches."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a final factor outside [0, 1]."""
        yield from super().validate()
        if not 0 <= self.final_factor <= 1:
            yield self.error("final_factor", "must lie between 0 and 1", "set schedule.final_factor=0.1")


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(_DecayingSchedule):
    """A straight line down to ``final_factor``."""

    kind: ClassVar[str] = "linear"

    def decay(self, progress: float) -> float:
        """Return the point on the line."""
        return 1.0 - (1.0 - self.final_factor) * progress


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(_DecayingSchedule):
    """Half a cosine down to ``final_factor`` (arXiv:1608.03983, without restarts)."""

    kind: ClassVar[str] = "cosine"

    def decay(self, progress: float) -> float:
        """Return the point on the half cosine."""
        return self.final_factor + (1.0 - self.final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))
