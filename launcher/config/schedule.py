"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule(Component):
    """A factor on the learning rate for each step, after a linear warm-up."""

    group: ClassVar[str] = "schedule"

    warmup_steps: int | float = 0
    """Steps over which the factor rises linearly from 1/(n+1) of the peak towards it.
    Below 1 it is a share of the run's steps, rounded up: 0.03 of 1000 steps are 30."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a negative warm-up."""
        yield from self.validate_minimum(0, "warmup_steps")
        yield from self._validate_whole("warmup_steps")

    def _validate_whole(self, field: str) -> Iterator[ConfigError]:
        """Reject numbers of steps that are neither whole nor a share."""
        value = getattr(self, field)
        if value > 1 and value != int(value):
            why = "from 1 on it is a number of steps, below 1 a share of them"
            yield self.error(field, why, f"set schedule.{field}={round(value)}")

    def num_warmup_steps(self, steps: int) -> int:
        """Return the steps of the warm-up in a run of so many steps."""
        return steps_of(self.warmup_steps, steps)

    def factor(self, step: int, steps: int) -> float:
        """Return the multiplier of the peak rate for optimizer step ``step`` (0-based) of ``steps``."""
        warmup = self.num_warmup_steps(steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        span = max(1, steps - warmup)
        return self.decay(min(1.0, (step - warmup) / span))

    @abstractmethod
    def decay(self, progress: float) -> float:
        """Return the multiplier after warm-up, for progress in [0, 1]."""


def steps_of(number: float, steps: int) -> int:
    """Return a number of steps: below 1 it is a share of ``steps``, rounded up."""
    return math.ceil(number * steps) if number < 1 else int(number)


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


@dataclass(frozen=True, kw_only=True)
class WsdSchedule(_DecayingSchedule):
    """Warm-up, stable peak, then a short decay (WSD, MiniCPM, arXiv:2404.06395, section 4).

    A run of more steps continues from a checkpoint of the stable phase, and decays later.
    """

    kind: ClassVar[str] = "wsd"
    summary_fields: ClassVar[tuple[str, ...]] = ("decay_steps", "shape")

    final_factor: float = 0.0
    """The multiplier that the last step approaches."""

    decay_steps: int | float = 0.1
    """Last steps of the run, over which the rate falls.
    Below 1 it is a share of the run's steps, rounded up; the paper takes 0.1."""

    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Curve of the decay; ``sqrt`` is 1 - sqrt(progress) (arXiv:2405.18392)."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a negative or broken number of steps."""
        yield from super().validate()
        yield from self.validate_minimum(0, "decay_steps")
        yield from self._validate_whole("decay_steps")

    def factor(self, step: int, steps: int) -> float:
        """Return the multiplier for optimizer step ``step`` (0-based) of ``steps``."""
        warmup = self.num_warmup_steps(steps)
        if step < warmup:
            return super().factor(step, steps)
        last_stable = max(warmup, steps - steps_of(self.decay_steps, steps)) - 1
        return self.decay(max(0.0, min(1.0, (step - last_stable) / max(1, steps - last_stable))))

    def decay(self, progress: float) -> float:
        """Return the point on the curve of the decay."""
        falling = {
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "sqrt": 1.0 - math.sqrt(progress),
        }[self.shape]
        return self.final_factor + (1.0 - self.final_factor) * falling
