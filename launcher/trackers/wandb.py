"""Weights & Biases: what is configured, and which mode a run really gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from launcher.errors import ConfigError
from launcher.plan import TrackerPlan
from launcher.suggest import did_you_mean
from launcher.trackers.base import Tracker
from launcher.trackers.wandb_key import find_credentials, read_settings

_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""What W&B's own client understands in WANDB_MODE, and what it means here."""

LATER = "`wandb sync` uploads it later"


@dataclass(frozen=True, kw_only=True)
class Wandb(Tracker):
    """One W&B run for each run, written by a process of its own beside rank 0."""

    kind: ClassVar[str] = "wandb"

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto`` is online with a key (WANDB_API_KEY or netrc), offline without one; the plan says which and why."""

    project: str = "launcher"
    """W&B project; a W&B sweep brings its own."""

    entity: str | None = None
    """W&B user or team; by default the key's own."""

    group_name: str | None = None
    """W&B group; by default ``run.name``."""

    tags: tuple[str, ...] = ()
    """W&B tags."""

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Choose the mode: what is configured, else WANDB_MODE, else online exactly when there is a key.

        In a W&B sweep the run is the one the sweep's agent asked for (WANDB_RUN_ID), in the sweep's project.

        Raises:
            ConfigError: online is wanted without a usable key, or WANDB_MODE is no mode.
        """
        mode, reason = self._mode(environ, home)
        in_sweep = bool(environ.get("WANDB_SWEEP_ID"))
        return TrackerPlan(
            kind=self.kind,
            mode=mode,
            reason=f"{reason}; part of W&B sweep {environ['WANDB_SWEEP_ID']}" if in_sweep else reason,
            run_id=environ.get("WANDB_RUN_ID") or run_id,
            project=(environ.get("WANDB_PROJECT") if in_sweep else None) or self.project,
            group=self.group_name or run_name,
        )

    def _mode(self, environ: Mapping[str, str], home: Path) -> tuple[str, str]:
        wanted, who = self._wanted(environ, home)
        if wanted == "disabled":
            return "disabled", who
        if wanted == "offline":
            return "offline", f"{who}; {LATER}"
        credentials = find_credentials(environ, home)
        if credentials.found:
            return "online", f"{credentials.text}, server {credentials.server}"
        if wanted == "online":
            option, _, value = who.partition("=")
            fix = "run `wandb login`, export WANDB_API_KEY, or set tracker.mode=offline"
            raise ConfigError(option, value, why=f"needs a key: {credentials.text}", fix=fix)
        return "offline", f"{credentials.text}; {LATER}"

    def _wanted(self, environ: Mapping[str, str], home: Path) -> tuple[str, str]:
        """Return auto or a mode, and who asked for it."""
        if self.mode != "auto":
            return self.mode, f"tracker.mode={self.mode}"
        given = environ.get("WANDB_MODE")
        if given:
            if given not in _MODES:
                raise ConfigError("WANDB_MODE", given, why="is no mode of W&B", fix=did_you_mean(given, _MODES))
            return _MODES[given], f"WANDB_MODE={given}"
        kept = _MODES.get(read_settings(environ, home).get("mode", ""))
        return (kept, "the W&B settings file") if kept in ("offline", "disabled") else ("auto", "tracker.mode=auto")
