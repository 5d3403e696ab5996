"""Group checkpoint: when to save, what to keep, and what a run resumes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.component import Component
from launcher.config.paths import PathText
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Component):
    """The policy of a run."""

    group: ClassVar[str] = "checkpoint"
    kind: ClassVar[str] = "policy"
    summary_fields: ClassVar[tuple[str, ...]] = ("every", "resume")

    every: int = 0
    """Optimizer steps between checkpoints; 0 writes none."""

    at_end: bool = False
    """Also write one after the last step."""

    keep: int = 2
    """Newest checkpoints kept; older ones are deleted once a newer one is complete. 0 keeps all."""

    keep_best: bool = True
    """Also keep the one with the lowest held-out loss."""

    resume: PathText = "none"
    """``none``, ``auto`` (continue this run directory), a run id, or a run or checkpoint folder.
    A run takes ``@best`` or ``@step_00000010``, else its newest checkpoint. Jobs that train or evaluate take one."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject negative counts."""
        yield from self.validate_minimum(0, "every", "keep")
