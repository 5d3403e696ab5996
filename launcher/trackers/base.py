"""Trackers read ``metrics.jsonl``, which every run writes; none of them can slow down or break training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launcher.component import Component
from launcher.plan import TrackerPlan


@dataclass(frozen=True, kw_only=True)
class Tracker(Component):
    """A place that a run is reported to."""

    group: ClassVar[str] = "tracker"

    @abstractmethod
    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Decide where metrics go, from what the machine that plans knows.

        Args:
            run_id: minted by the launcher; a resumed run keeps it.
            environ: the environment the tracker will inherit.
            home: the user's home, where credentials are kept.
            run_name: ``run.name``.

        Raises:
            ConfigError: the tracker cannot do what it was told to.
        """


@dataclass(frozen=True, kw_only=True)
class Local(Tracker):
    """Nothing besides the run directory."""

    kind: ClassVar[str] = "local"

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return a plan without a process beside the ranks."""
        return TrackerPlan(kind=self.kind, mode="offline", reason="metrics.jsonl only", run_id=run_id)
