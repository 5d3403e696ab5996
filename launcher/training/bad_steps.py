"""Judge each optimizer step: a loss or gradient that is not finite, or a loss that spikes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING

from launcher.config.job.train import FEWEST_LOSSES, LOSS_WINDOW
from launcher.errors import JobError

if TYPE_CHECKING:
    from launcher.config.job.train import Train
    from launcher.engines.base import StepResult


class BadSteps:
    """Recognizes bad steps, the same on every rank, and ends a run with too many of them.

    Args:
        job: says what counts as a spike, and what follows.
        drops_steps: the precision is fp16, which drops steps whose scaled gradient overflows and goes on.
    """

    def __init__(self, job: Train, *, drops_steps: bool) -> None:
        self._job, self._drops_steps = job, drops_steps
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self._consecutive, self._rewound_to = 0, -1

    @property
    def losses(self) -> tuple[float, ...]:
        """Losses that the next one is compared with; empty without ``job.spike_factor``."""
        return tuple(self._losses)

    def restore(self, losses: Iterable[float]) -> None:
        """Continue from the losses before a checkpoint."""
        self._losses.clear()
        if self._job.spike_factor is not None:
            self._losses.extend(losses)

    @property
    def limit(self) -> float:
        """Loss from which on the next step is a spike; infinite where none is."""
        if self._job.spike_factor is None or len(self._losses) < FEWEST_LOSSES:
            return math.inf
        return self._job.spike_factor * median(self._losses)

    def judge(self, result: StepResult) -> str | None:
        """Return what is bad about a step; remember the loss of a good one."""
        why = self._fault(result)
        if why is None:
            self._consecutive = 0 if self._job.on_bad_step == "skip" else self._consecutive
            if self._job.spike_factor is not None:
                self._losses.append(result.loss)
        return why

    def _fault(self, result: StepResult) -> str | None:
        if not math.isfinite(result.loss):
            return f"loss is {result.loss}, first seen on rank {', '.join(map(str, result.nonfinite_ranks))}"
        if result.loss >= self.limit:
            middle = median(self._losses)
            return f"loss {result.loss:.4f} is {result.loss / middle:.4g} times {middle:.4f}, the median before"
        norm = result.grad_norm
        if (result.skipped and not self._drops_steps) or (norm is not None and not 0 <= norm < math.inf):
            return "the gradient is not finite"
        return None

    def count_skip(self, step: int, why: str) -> None:
        """Count a step that was skipped.

        Raises:
            JobError: as many steps in a row are bad as the job allows.
        """
        self._consecutive += 1
        if self._consecutive > self._job.max_bad_steps:
            raise JobError(f"step {step}: {why}. {self._job.max_bad_steps} steps before it were bad too; {_ADVICE}")

    def count_rewind(self, step: int, why: str, *, to: int) -> None:
        """Count a rewind from ``step`` to the checkpoint of step ``to``.

        Raises:
            JobError: as many rewinds led to this checkpoint as the job allows.
        """
        self._consecutive = self._consecutive + 1 if to == self._rewound_to else 1
        self._rewound_to = to
        if self._consecutive > self._job.max_bad_steps:
            times = self._job.max_bad_steps
            raise JobError(f"step {step}: {why}. {times} rewinds to step {to} led to bad steps; {_ADVICE}")


_ADVICE = "lower optimizer.lr, raise schedule.warmup_steps, or set precision=bf16 where it is fp16"


def fatal(step: int, why: str) -> JobError:
    """Return the error that ends a run at a bad step."""
    return JobError(f"training fails at step {step}: {why}; {_ADVICE}; job.on_bad_step=skip goes on without such steps")
