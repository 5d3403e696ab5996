"""Weights & Biases: what is configured, and which mode a run really gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.trackers.base import Tracker


@dataclass(frozen=True, kw_only=True)
class Wandb(Tracker):
    """One W&B run for each run, written by a process of its own beside rank 0."""

    kind: ClassVar[str] = "wandb"

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto`` is online with a key (WANDB_API_KEY or netrc), offline without one; the plan says which and why."""

    project: str = "launcher"
    """W&B project."""

    entity: str | None = None
    """W&B user or team; by default the key's own."""

    group_name: str | None = None
    """W&B group; by default ``run.name``."""

    tags: tuple[str, ...] = ()
    """W&B tags."""
