"""Trackers read ``metrics.jsonl``, which every run writes; none of them can slow down or break training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from launcher.component import Component


@dataclass(frozen=True, kw_only=True)
class Tracker(Component):
    """A place that a run is reported to."""

    group: ClassVar[str] = "tracker"


@dataclass(frozen=True, kw_only=True)
class Local(Tracker):
    """Nothing besides the run directory."""

    kind: ClassVar[str] = "local"
