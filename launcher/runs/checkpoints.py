"""The checkpoints that a run has kept, and how to use the model in them."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.checkpoint.store import SavedCheckpoint, best_first, complete_checkpoints, silent
from launcher.protocol.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class KeptCheckpoints:
    """The complete checkpoints of one run."""

    newest: SavedCheckpoint
    best: SavedCheckpoint | None
    """By ``checkpoint.best_metric``; ``None`` if none was evaluated."""
    steps: tuple[int, ...]
    """Steps of all, the highest first."""

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.steps[:5])) + (", …" if len(self.steps) > 5 else "")
        return f"step{'s' if len(self.steps) > 1 else ''} {shown}{f'; best: {self.best_text}' if self.best else ''}"

    @property
    def best_text(self) -> str:
        """The best one's step and metric (``step 20, loss 2.1034``), if one was evaluated."""
        assert self.best is not None, "checked by the caller"
        manifest = self.best.manifest
        name = manifest.best_metric.partition(":")[2]
        value = manifest.metric(name)
        return f"step {manifest.step}" + ("" if value is None else f", {name} {value:.4f}")


def kept_checkpoints(run_dir: RunDir) -> KeptCheckpoints | None:
    """Return the complete checkpoints of a run; ``None`` without any."""
    saved = list(complete_checkpoints(run_dir.checkpoints, say=silent))
    if not saved:
        return None
    steps = tuple(entry.manifest.step for entry in saved)
    return KeptCheckpoints(newest=saved[0], best=next(iter(best_first(saved)), None), steps=steps)
