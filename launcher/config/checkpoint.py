"""Group checkpoint: when to save, what to keep, and what a run resumes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.component import Component
from launcher.config.paths import PathText
from launcher.errors import ConfigError

LOWEST_LOSS = "min:loss"
_METRIC = re.compile(r"(min|max):.+")

ASYNC_MIN_BYTES = 32 << 20
"""A rank that writes less is done sooner than a copy and a thread are worth."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Component):
    """The policy of a run."""

    group: ClassVar[str] = "checkpoint"
    kind: ClassVar[str] = "policy"
    summary_fields: ClassVar[tuple[str, ...]] = ("every", "resume")

    every: int = 0
    """Optimizer steps between checkpoints; 0 saves the trained model only (``at_end``).
    With 0 a run that fails on the way starts over. One that is asked to end (SIGTERM, ``launch cancel``) saves first,
    whatever this is. ``job.on_bad_step=rewind`` needs it above 0."""

    at_end: bool = True
    """Also write one after the last step: the trained model."""

    keep: int = 2
    """Newest checkpoints kept; older ones are deleted once a newer one is complete. 0 keeps all."""

    keep_best: bool = True
    """Also keep the best one by ``best_metric``."""

    best_metric: str = LOWEST_LOSS
    """Metric of the best checkpoint: ``min:loss`` is the lowest held-out loss.
    ``min:NAME`` and ``max:NAME`` take a metric of ``job.metrics``, or ``NAME/loss`` of a set or a source of the data.
    Only checkpoints whose step was evaluated count."""

    keep_every: int = 0
    """Also keep the checkpoints of steps that are multiples of this; 0 keeps none for that."""

    async_mode: Literal["auto", "async", "disabled"] = "auto"
    """``async`` copies the state to host memory and writes it beside the next steps.
    ``disabled`` writes it first. ``auto`` is ``async`` where a rank writes 32 MiB or more and nothing lies on NVMe."""

    resume: PathText = "none"
    """``none``, ``auto`` (continue this run directory), a run id, or a run or checkpoint folder.
    A run takes ``@best`` or ``@step_00000010``, else its newest checkpoint. Checkpoints of other programs are read too.
    Jobs that train or evaluate take one."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject negative counts and a metric without a direction."""
        yield from self.validate_minimum(0, "every", "keep", "keep_every")
        if not _METRIC.fullmatch(self.best_metric):
            yield self.error("best_metric", "is not min:NAME or max:NAME", f"set checkpoint.best_metric={LOWEST_LOSS}")

    @property
    def is_own(self) -> bool:
        """Whether a run resumes from checkpoints of its own, not from another run's."""
        return self.resume == "auto"

    def most_at_once(self, num_steps: int | None) -> int | None:
        """Return how many checkpoints are on the disk at most, with the one that is being written.

        Args:
            num_steps: of the run; ``None`` if unknown, and the result is then, too, if they decide.
        """
        kept = self.keep + self.keep_best + 1
        if num_steps is None:
            return None if self.keep == 0 or self.keep_every else kept
        written = num_steps // self.every if self.every else 0
        if self.at_end and (not self.every or num_steps % self.every):
            written += 1
        if self.keep == 0:
            return written
        return min(written, kept + (num_steps // self.keep_every if self.keep_every else 0))

    @property
    def kept_text(self) -> str:
        """The options that say which checkpoints are kept."""
        more = f" checkpoint.keep_every={self.keep_every}" if self.keep_every else ""
        return f"checkpoint.keep={self.keep} checkpoint.keep_best={str(self.keep_best).lower()}{more}"

    def is_async(self, num_bytes: int, *, on_nvme: bool) -> bool:
        """Whether a rank that writes ``num_bytes`` goes on while they are written."""
        if self.async_mode == "auto":
            return num_bytes >= ASYNC_MIN_BYTES and not on_nvme
        return self.async_mode == "async"
